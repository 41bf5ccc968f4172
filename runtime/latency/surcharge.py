"""What weights and rows cost that no grid of widths can hold: beyond the CPU's cache, and beside a kernel's stride."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .shape import DecoderShape, LayerShape

BLOCK = 32
"""Weights in a quantised block; exporters pad rows to whole ones."""


@dataclass(frozen=True)
class Surcharge:
    """Arrays are by condition, as the table's grids.

    Weights are read in turn, token after token: a cache of some size holds all of a smaller model's and none of one
    that is twice as large, in between a part. Deep decoding leaves less room for weights, and a prompt reads them once
    for many tokens. Kernels that take two blocks at a time (SSE) finish rows of an odd number one by one.
    """

    capacity: np.ndarray
    """Weights that fit the cache, at least one."""
    spill_ms: np.ndarray
    """Milliseconds more of a million weights where none is found in the cache."""
    odd_ms: np.ndarray
    """Milliseconds more of a thousand rows of an odd number of blocks."""

    def __post_init__(self) -> None:
        arrays = (self.capacity, self.spill_ms, self.odd_ms)
        if len({array.shape for array in arrays}) > 1 or self.capacity.ndim != 1:
            raise ValueError("a surcharge needs a capacity and milliseconds of every condition")
        if not all(np.isfinite(array).all() and (array >= 0).all() for array in arrays) or (self.capacity < 1).any():
            raise ValueError("a surcharge holds a value that is no size or no time")

    def per_weight(self, num_weights: float) -> np.ndarray:
        """Milliseconds more [conditions] of each weight of a model that has so many."""
        return 1e-6 * self.spill_ms * missed(num_weights, self.capacity)

    def of(self, shape: DecoderShape) -> np.ndarray:
        """Milliseconds more [conditions] of a whole model."""
        return shape.num_weights * self.per_weight(shape.num_weights) + 1e-3 * self.odd_ms * odd_rows(shape)

    def to_json(self) -> dict[str, Any]:
        return {
            "capacity": self.capacity.tolist(),
            "spill_ms": np.round(self.spill_ms, 7).tolist(),
            "odd_ms": np.round(self.odd_ms, 7).tolist(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Surcharge:
        """The inverse of `to_json`."""
        return cls(*(np.array(values[name], float) for name in ("capacity", "spill_ms", "odd_ms")))


def missed(num_weights: np.ndarray | float, capacity: np.ndarray | float) -> np.ndarray:
    """Share of a model's weights that are not found in a cache with room for `capacity`."""
    return np.clip((num_weights - capacity) / capacity, 0.0, 1.0)


def is_odd(width: int) -> bool:
    """Whether rows of so many weights are an odd number of blocks, as they are exported."""
    return -(-width // BLOCK) % 2 == 1


def head_odd_rows(shape: DecoderShape) -> int:
    """Rows of the LM head of an odd number of blocks."""
    return shape.vocab_size * is_odd(shape.hidden_size)


def attention_odd_rows(layer: LayerShape, shape: DecoderShape) -> int:
    """Rows of an attention's matrices of an odd number of blocks."""
    hidden, heads, groups = shape.hidden_size, layer.num_attention_heads, layer.num_key_value_heads
    reading = shape.head_dim * (heads + 2 * groups) * is_odd(hidden)
    return reading + hidden * is_odd(heads * shape.head_dim)


def ffn_odd_rows(layer: LayerShape, shape: DecoderShape) -> int:
    """Rows of an FFN's matrices of an odd number of blocks."""
    return 2 * layer.intermediate_size * is_odd(shape.hidden_size) + shape.hidden_size * is_odd(layer.intermediate_size)


def odd_rows(shape: DecoderShape) -> int:
    """Rows of all of a model's matrices of an odd number of blocks."""
    layers = (attention_odd_rows(layer, shape) + ffn_odd_rows(layer, shape) for layer in shape.present_layers)
    return head_odd_rows(shape) + sum(layers)
