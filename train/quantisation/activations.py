"""Activations as dynamically quantised products see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOWEST, HIGHEST = -128, 127
SMALLEST = torch.finfo(torch.float32).eps
"""Of a scale, as in torchao."""


class _RoundToInt8(torch.autograd.Function):
    """Straight-through rounding: the gradient passes as it comes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        x = values.float()
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (HIGHEST - LOWEST)).clamp(min=SMALLEST)
        zero = (LOWEST - (low / scale).round()).clamp(LOWEST, HIGHEST)
        codes = ((x / scale).round() + zero).clamp(LOWEST, HIGHEST)
        return ((codes - zero) * scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def round_to_int8(values: Tensor) -> Tensor:
    """[..., H] rounded token by token to 256 steps between its least and its largest value (0 among them): XNNPACK's
    dynamically quantised products, torchao's per-token asymmetric int8."""
    return _RoundToInt8.apply(values)  # type: ignore[return-value]
