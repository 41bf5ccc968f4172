"""Values measured at the nodes of a grid, and everything between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def weights_between(nodes: Sequence[float], value: float) -> np.ndarray:
    """Weights [N] of ascending `nodes` that interpolate at `value`: linear, and on along the last piece outside."""
    weights = np.zeros(len(nodes))
    if len(nodes) == 1:
        weights[0] = 1.0
        return weights
    left = int(np.clip(np.searchsorted(nodes, value, side="right") - 1, 0, len(nodes) - 2))
    share = (value - nodes[left]) / (nodes[left + 1] - nodes[left])
    weights[left], weights[left + 1] = 1 - share, share
    return weights


def parabola_weights(nodes: Sequence[float], value: float) -> np.ndarray:
    """Weights [N] of ascending `nodes` that give the parabola through three of them at `value`, by Lagrange: the two
    around it and the next below, or the first or last three; with fewer nodes a line or a constant."""
    last = int(np.clip(np.searchsorted(nodes, value, side="left"), min(2, len(nodes) - 1), len(nodes) - 1))
    used = range(max(0, last - 2), last + 1)
    weights = np.zeros(len(nodes))
    for one in used:
        others = [nodes[other] for other in used if other != one]
        weights[one] = np.prod([(value - other) / (nodes[one] - other) for other in others])
    return weights


@dataclass(frozen=True)
class Grid:
    """Values [N1, ..., Nk, C] over k axes: C figures, such as milliseconds by depth, at every node."""

    axes: tuple[tuple[int, ...], ...]
    """Nodes of each axis, ascending."""
    values: np.ndarray

    def __post_init__(self) -> None:
        sizes = tuple(len(axis) for axis in self.axes)
        if self.values.shape[:-1] != sizes or any(list(axis) != sorted(set(axis)) or not axis for axis in self.axes):
            raise ValueError(f"a grid of axes {sizes} holds values of shape {self.values.shape}")
        if not np.isfinite(self.values).all():
            raise ValueError("a grid holds a value that is no number")

    def at(self, *point: float) -> np.ndarray:
        """The figures [C] at a point: multilinear between nodes."""
        values = self.values
        for nodes, coordinate in zip(self.axes, point, strict=True):
            values = np.tensordot(weights_between(nodes, coordinate), values, axes=1)
        return values
