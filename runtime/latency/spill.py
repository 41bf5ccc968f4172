"""What weights cost more where a model's do not fit a cache of the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Spill:
    """Weights are read in turn, token after token: a cache of some size holds all of a smaller model's and none of one
    that is twice as large, in between a part. Arrays are by condition, as the table's grids: deep decoding leaves less
    room for weights, and a prompt reads them once for many tokens."""

    capacity: np.ndarray
    """Weights that fit, above 0."""
    ms: np.ndarray
    """Milliseconds more of a million weights where none is found in the cache."""

    def __post_init__(self) -> None:
        if self.capacity.shape != self.ms.shape or self.capacity.ndim != 1:
            raise ValueError("a spill needs a capacity and milliseconds of every condition")
        if not (self.capacity > 0).all() or not np.isfinite(self.ms).all() or (self.ms < 0).any():
            raise ValueError("a spill holds a value that is no size or no time")

    def per_weight(self, num_weights: float) -> np.ndarray:
        """Milliseconds more [conditions] of each weight of a model that has so many."""
        return 1e-6 * self.ms * missed(num_weights, self.capacity)

    def to_json(self) -> dict[str, Any]:
        return {"capacity": self.capacity.tolist(), "ms": np.round(self.ms, 7).tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Spill:
        """The inverse of `to_json`."""
        return cls(np.array(values["capacity"], float), np.array(values["ms"], float))


def missed(num_weights: np.ndarray | float, capacity: np.ndarray | float) -> np.ndarray:
    """Share of a model's weights that are not found in a cache with room for `capacity`."""
    return np.clip((num_weights - capacity) / capacity, 0.0, 1.0)
