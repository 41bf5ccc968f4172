"""The gradients of one optimizer step: over microbatches and ranks, and in samples where saliency asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .compute.distributed import Parallel, without_sync
from .pruning.pruner import Pruner


def accumulate_gradients(
    callee: nn.Module, model: Any, microbatches: Sequence[Tensor], pruner: Pruner | None, parallel: Parallel
) -> float:
    """Leave the gradients of the mean loss over all microbatches [B, S + 1] and ranks in .grad of the model's
    parameters; returns this rank's mean cross-entropy.

    A saliency that is not linear in the gradient (taylor2, fisher) must see every microbatch of every rank alone.
    Then .grad is emptied after each one and DDP averages nothing: the sums are kept aside and averaged at the end.
    FSDP reduces gradients in its own backward pass, so there a sample is a microbatch of all ranks.
    """
    steps = len(microbatches)
    needs_samples = pruner is not None and pruner.wants_microbatches
    per_microbatch = needs_samples and (steps > 1 or parallel.world_size > 1)
    accumulated: dict[Tensor, Tensor] = {}
    total = 0.0
    for place, windows in enumerate(microbatches):
        is_last = place == steps - 1
        with without_sync(callee, per_microbatch or not is_last):
            loss, cross_entropy = callee(windows)
            # samples keep the scale of one microbatch; the mean over steps is taken once, below
            (loss if per_microbatch else loss / steps).backward()
        total += float(cross_entropy)
        if pruner is not None:
            pruner.mask_gradients()
            if per_microbatch:
                pruner.observe_gradients()
        if per_microbatch:
            _move_gradients(model.parameters(), accumulated)
    if per_microbatch:
        for parameter, gradient in accumulated.items():
            parameter.grad = gradient.div_(steps)
        if parallel.mode == "ddp":
            parallel.mean_tensors(accumulated.values())
    elif pruner is not None:
        pruner.observe_gradients()
    return total / steps


def _move_gradients(parameters: Iterable[Tensor], accumulated: dict[Tensor, Tensor]) -> None:
    """Add .grad of every parameter to `accumulated` and empty it."""
    for parameter in parameters:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            accumulated[parameter] = gradient if parameter not in accumulated else accumulated[parameter].add_(gradient)
