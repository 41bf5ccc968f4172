"""Gradients of one optimizer step over microbatches and ranks, in samples if saliency needs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .compute.distributed import Parallel, without_sync
from .compute.loss import count_predicted
from .pruning.pruner import Pruner


def accumulate_gradients(
    callee: nn.Module,
    model: Any,
    microbatches: Sequence[Tensor],
    pruner: Pruner | None,
    parallel: Parallel,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Leave the gradients of the mean loss over all learned tokens of the step in .grad of the parameters.

    The mean covers all microbatches [B, S + 1] and ranks. Returns this rank's share of the step's cross-entropy; its
    mean over ranks is the mean over all learned tokens.

    A saliency that is not linear in the gradient (taylor2, fisher) needs every microbatch of every rank alone. Then
    .grad is emptied after each one and DDP averages nothing. The sums are kept aside and averaged at the end. FSDP
    reduces gradients in its own backward pass, so a sample is a microbatch of all ranks there.

    `check` is called between microbatches and may raise.
    """
    steps = len(microbatches)
    needs_samples = pruner is not None and pruner.wants_microbatches
    per_microbatch = needs_samples and (steps > 1 or parallel.world_size > 1)
    shares = _shares(microbatches, parallel)
    accumulated: dict[Tensor, Tensor] = {}
    total = 0.0
    for place, (windows, share) in enumerate(zip(microbatches, shares, strict=True)):
        if place:
            check()
        is_last = place == steps - 1
        with without_sync(callee, per_microbatch or not is_last):
            loss, cross_entropy = callee(windows)
            # a sample keeps the scale of a mean over its own tokens; its share of the step is taken below
            (loss / (share.sample_divisor if per_microbatch else share.divisor)).backward()
        total += float(cross_entropy) * share.tokens
        if pruner is not None:
            pruner.mask_gradients()
            if per_microbatch:
                pruner.observe_gradients(share.sample_weight)
        if per_microbatch:
            _move_gradients(model.parameters(), accumulated, share.sample_weight)
    if per_microbatch:
        for parameter, gradient in accumulated.items():
            parameter.grad = gradient.div_(steps)
        if parallel.mode == "ddp":
            parallel.mean_tensors(accumulated.values())
    elif pruner is not None:
        pruner.observe_gradients()
    tokens = sum(share.tokens for share in shares)
    return total / max(1, tokens) * (tokens / shares[0].mean_tokens)


@dataclass(frozen=True)
class _Share:
    """Weight of one microbatch of one rank in a step.

    If all microbatches of all ranks have the same number of learned tokens, the divisors and weights are whole numbers,
    and nothing is rounded.
    """

    tokens: int
    """Learned tokens of the microbatch."""
    sample_tokens: float
    """Learned tokens of its sample: a mean over ranks if the sample is a microbatch of all ranks."""
    mean_tokens: float
    """Learned tokens of a rank in the step, a mean over ranks; 1 if there are none."""
    steps: int
    """Microbatches of a rank in the step."""

    @property
    def divisor(self) -> float:
        """Return the divisor that turns the microbatch's mean loss into its part of the step's, which ranks average."""
        return self.mean_tokens / self.tokens if self.tokens else math.inf

    @property
    def sample_divisor(self) -> float:
        """Return the divisor from the microbatch's mean loss to its part of the sample's, which ranks average."""
        return self.sample_tokens / self.tokens if self.tokens else math.inf

    @property
    def sample_weight(self) -> float:
        """Return the weight of the sample; 1 on average over the samples of a step."""
        return self.sample_tokens * self.steps / self.mean_tokens


def _shares(microbatches: Sequence[Tensor], parallel: Parallel) -> list[_Share]:
    """Return one share per microbatch of this rank (a collective call)."""
    tokens = [count_predicted(windows) for windows in microbatches]
    over_ranks = torch.tensor(tokens, dtype=torch.float64, device=parallel.device)
    parallel.mean_tensors([over_ranks])
    means = over_ranks.tolist()
    of_samples = means if parallel.mode == "fsdp" else tokens
    mean_tokens, steps = sum(means) or 1.0, len(tokens)
    return [_Share(each, sample, mean_tokens, steps) for each, sample in zip(tokens, of_samples, strict=True)]


def _move_gradients(parameters: Iterable[Tensor], accumulated: dict[Tensor, Tensor], weight: float) -> None:
    """Add `weight` times .grad of every parameter to `accumulated` and empty it."""
    for parameter in parameters:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            gradient = gradient.mul_(weight) if weight != 1.0 else gradient
            accumulated[parameter] = gradient if parameter not in accumulated else accumulated[parameter].add_(gradient)
