"""AdamW whose moments and gradients may be stored in bf16.

Arithmetic is fp32 throughout. A tensor of another type is converted in pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .distributed import full, local

EPSILON = 1e-8
"""Constant added to the root of the second moment."""

PIECE = 2**20
"""Elements of a tensor that are converted at once on a CPU, whose caches hold them."""
PIECE_ON_GPU = 2**24
"""The same on a GPU, where each piece starts some ten kernels. Its copies take 270 MB."""


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on torch's fused kernel, with moments allocated at the start."""

    def __init__(
        self, groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], moments: torch.dtype
    ) -> None:
        """Create the optimizer with both moments in `moments`, fp32 or bf16 (see config.SLOWEST_BFLOAT16_DECAY)."""
        super().__init__(groups, {"lr": learning_rate, "betas": betas})
        # now, not in the first step: a checkpoint is read into these tensors
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, dtype=moments),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=moments),
                }

    @torch.no_grad()
    def step(self, closure: None = None, gradient_scale: Tensor | None = None) -> None:  # type: ignore[override]
        """Update every parameter with a gradient, scaled by `gradient_scale` (which changes fp32 .grad)."""
        for group in self.param_groups:
            with_gradient = [each for each in group["params"] if each.grad is not None]
            updated = [_local_tensors(each, self.state[each]) for each in with_gradient]
            plain = [each for each in updated if each.is_of_one_type]
            # torch's kernel reads the number of the step and does not count it
            if updated:
                torch._foreach_add_([each.step for each in updated], 1)
            if plain:  # one call for all tensors; only those of one type can share it
                if gradient_scale is not None:
                    torch._foreach_mul_([each.tensors[1] for each in plain], gradient_scale)
                _fused(group, plain)
            for each in updated:
                if not each.is_of_one_type:
                    _update_in_pieces(group, each, gradient_scale)


@dataclass(frozen=True, eq=False)
class _LocalTensors:
    """Tensors of a parameter on this rank."""

    tensors: tuple[Tensor, ...]
    """Weights, gradient, first and second moment, of one shape."""
    step: Tensor
    """[] fp32: number of updates, this one included."""

    @property
    def is_of_one_type(self) -> bool:
        return len({tensor.dtype for tensor in self.tensors}) == 1


def _local_tensors(parameter: Any, state: dict[str, Any]) -> _LocalTensors:
    values = (parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"])
    return _LocalTensors(tuple(map(local, values)), state["step"])


def _fused(group: dict[str, Any], updated: Sequence[_LocalTensors]) -> None:
    """Run torch's kernel on tensors of one type."""
    columns = zip(*(each.tensors for each in updated), strict=True)
    parameters, gradients, first, second = (list(column) for column in columns)
    beta1, beta2 = group["betas"]
    # the kernel itself, as torch's AdamW creates its moments in the type of the parameter
    torch._fused_adamw_(
        *(parameters, gradients, first, second, [], [each.step for each in updated]),
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
    )


def _update_in_pieces(group: dict[str, Any], whole: _LocalTensors, gradient_scale: Tensor | None) -> None:
    """Update one parameter with a gradient or moments in bf16, piece by piece."""
    weight = whole.tensors[0]
    piece = PIECE_ON_GPU if weight.device.type == "cuda" else PIECE
    rows = max(1, piece // max(1, weight[:1].numel()))
    pieces = zip(*(tensor.split(rows) for tensor in whole.tensors), strict=True)
    for parameter, gradient, first, second in pieces:
        scaled = gradient.float()
        if gradient_scale is not None:
            scaled = scaled * gradient_scale
        moments = first.float(), second.float()
        _fused(group, [_LocalTensors((parameter, scaled, *moments), whole.step)])
        first.copy_(moments[0])
        second.copy_(moments[1])


def make_optimizer(
    model: Any,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    moments: torch.dtype = torch.float32,
) -> AdamW:
    """Return AdamW with its moments in `moments` and weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, learning_rate, betas, moments)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the norm [] fp32 of all gradients, over all shards (a collective call)."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # a bf16 norm would be off by 0.4 %
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    if not norms:
        return torch.zeros(())
    return full(torch.linalg.vector_norm(torch.stack(norms)))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return [] fp32: the factor that clips gradients of `norm` to `max_norm`, at most 1."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # the constant of torch's clip_grad_norm_


def store_gradients_as_computed(model: Any) -> None:
    """Store the gradients of the layers' matrices in bf16, the type of a bf16 matrix product, without loss.

    Use it only for steps of one backward pass in one process, because sums of gradients are formed in fp32. A torch
    without `grad_dtype` stores all of them in fp32.
    """
    for layer in model.model.layers:
        for parameter in layer.parameters():
            if parameter.dim() == 2 and hasattr(parameter, "grad_dtype"):
                parameter.grad_dtype = torch.bfloat16
