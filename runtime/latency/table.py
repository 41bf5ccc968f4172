"""Latency table: a grid of measured milliseconds for every part of a decoder.

The last axis of every grid is the condition: decoding one token at each of `depths`, then evaluating a prompt of each
of `prompts` tokens. A workload is a weight for each condition. Between two depths, milliseconds are interpolated
linearly. Between prompt lengths a parabola is used, because attention grows with the square. The surcharge covers costs
that no grid of widths can hold.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .shape import DecoderShape, LayerShape, Workload

BLOCK = 32
"""Weights in a quantised block; exporters pad rows to whole blocks."""


@dataclass(frozen=True)
class Surcharge:
    """Cost beyond the CPU's cache and of odd rows; arrays by condition, as in the table's grids.

    Weights are read in order, token after token. A cache holds all weights of a small model, none of a model twice its
    size, and a part in between. Deep decoding leaves less room for weights, and a prompt reads them once for many
    tokens. Kernels that take two blocks at a time (SSE) compute rows with an odd number of blocks one by one.
    """

    capacity: np.ndarray
    """Weights that fit into the cache, at least one."""
    spill_ms: np.ndarray
    """Further milliseconds of a million weights outside the cache."""
    odd_ms: np.ndarray
    """Further milliseconds of a thousand rows with an odd number of blocks."""

    def __post_init__(self) -> None:
        arrays = (self.capacity, self.spill_ms, self.odd_ms)
        if len({array.shape for array in arrays}) > 1 or self.capacity.ndim != 1:
            raise ValueError("a surcharge needs a capacity and milliseconds of every condition")
        are_valid = all(np.isfinite(array).all() and (array >= 0).all() for array in arrays)
        if not are_valid or (self.capacity < 1).any():
            raise ValueError("a surcharge has a value that is not a size or a time")

    def per_weight(self, num_weights: float) -> np.ndarray:
        """Return the further milliseconds [conditions] of each weight of a model with this number of weights."""
        return 1e-6 * self.spill_ms * missed(num_weights, self.capacity)

    def of(self, shape: DecoderShape) -> np.ndarray:
        """Return the further milliseconds [conditions] of a whole model."""
        return shape.num_weights * self.per_weight(shape.num_weights) + 1e-3 * self.odd_ms * odd_rows(shape)

    def to_json(self) -> dict[str, Any]:
        return {
            "capacity": self.capacity.tolist(),
            "spill_ms": np.round(self.spill_ms, 7).tolist(),
            "odd_ms": np.round(self.odd_ms, 7).tolist(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Surcharge:
        """Read the values of `to_json`."""
        return cls(*(np.array(values[name], float) for name in ("capacity", "spill_ms", "odd_ms")))


def missed(num_weights: np.ndarray | float, capacity: np.ndarray | float) -> np.ndarray:
    """Return the share of a model's weights outside a cache with room for `capacity`."""
    return np.clip((num_weights - capacity) / capacity, 0.0, 1.0)


def is_odd(width: int) -> bool:
    """Tell whether rows of this width have an odd number of blocks as exported."""
    return -(-width // BLOCK) % 2 == 1


def head_odd_rows(shape: DecoderShape) -> int:
    """Count the rows of the LM head with an odd number of blocks."""
    return shape.vocab_size * is_odd(shape.hidden_size)


def attention_odd_rows(layer: LayerShape, shape: DecoderShape) -> int:
    """Count the rows of an attention's matrices with an odd number of blocks."""
    hidden, heads, groups = shape.hidden_size, layer.num_attention_heads, layer.num_key_value_heads
    rows_of_qkv = shape.head_dim * (heads + 2 * groups)
    return rows_of_qkv * is_odd(hidden) + hidden * is_odd(heads * shape.head_dim)


def ffn_odd_rows(layer: LayerShape, shape: DecoderShape) -> int:
    """Count the rows of an FFN's matrices with an odd number of blocks."""
    rows_of_gate_and_up = 2 * layer.intermediate_size
    rows_of_down = shape.hidden_size
    return rows_of_gate_and_up * is_odd(shape.hidden_size) + rows_of_down * is_odd(layer.intermediate_size)


def odd_rows(shape: DecoderShape) -> int:
    """Count the rows of all matrices with an odd number of blocks."""
    layers = (attention_odd_rows(layer, shape) + ffn_odd_rows(layer, shape) for layer in shape.present_layers)
    return head_odd_rows(shape) + sum(layers)


def weights_between(nodes: Sequence[float], value: float) -> np.ndarray:
    """Return weights [N] of ascending `nodes` for linear interpolation at `value`, extrapolated outside."""
    weights = np.zeros(len(nodes))
    if len(nodes) == 1:
        weights[0] = 1.0
        return weights
    left = int(np.clip(np.searchsorted(nodes, value, side="right") - 1, 0, len(nodes) - 2))
    share = (value - nodes[left]) / (nodes[left + 1] - nodes[left])
    weights[left], weights[left + 1] = 1 - share, share
    return weights


def parabola_weights(nodes: Sequence[float], value: float) -> np.ndarray:
    """Return weights [N] of ascending `nodes` for the parabola through three of them at `value` (Lagrange).

    The three are the two around the value and the next below, or the first or last three. With fewer nodes it is a line
    or a constant.
    """
    at_most = len(nodes) - 1
    above = np.searchsorted(nodes, value, side="left")
    last = int(np.clip(above, min(2, at_most), at_most))
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
    """Ascending nodes of each axis."""
    values: np.ndarray

    def __post_init__(self) -> None:
        sizes = tuple(len(axis) for axis in self.axes)
        are_ascending = all(axis and list(axis) == sorted(set(axis)) for axis in self.axes)
        if self.values.shape[:-1] != sizes or not are_ascending:
            raise ValueError(f"a grid of axes {sizes} holds values of shape {self.values.shape}")
        if not np.isfinite(self.values).all():
            raise ValueError("a grid has a value that is not a number")

    def at(self, *point: float) -> np.ndarray:
        """Return the figures [C] at a point, multilinear between nodes."""
        values = self.values
        for nodes, coordinate in zip(self.axes, point, strict=True):
            values = np.tensordot(weights_between(nodes, coordinate), values, axes=1)
        return values


PARTS = {
    "token": ("hidden_size",),
    "head": ("hidden_size", "vocab_size"),
    "attention": ("hidden_size", "num_key_value_heads", "queries_per_group"),
    "no_attention": ("hidden_size",),
    "ffn": ("hidden_size", "intermediate_size"),
    "no_ffn": ("hidden_size",),
}
"""Part -> the axes of its grid. no_attention and no_ffn are the remaining costs of a layer without that part."""


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of each part by widths and condition."""

    head_dim: int
    """Channels of one attention head in all measurements."""
    depths: tuple[int, ...]
    """Tokens in the cache at the measured decodes, ascending."""
    prompts: tuple[int, ...]
    """Lengths of the measured prompts, ascending."""
    parts: dict[str, Grid]
    """Grid of each of PARTS, without the surcharge."""
    surcharge: Surcharge | None = None
    """None if the grids have all costs."""

    def __post_init__(self) -> None:
        if not self.depths or not self.prompts or self.head_dim < 1:
            raise ValueError("a table needs heads, depths and prompts")
        for nodes in (self.depths, self.prompts):
            if list(nodes) != sorted(set(nodes)):
                raise ValueError(f"{nodes} are not ascending")
        for part, axes in PARTS.items():
            grid = self.parts.get(part)
            if grid is None or len(grid.axes) != len(axes) or grid.values.shape[-1] != self.num_conditions:
                raise ValueError(f"part {part!r} is missing or has other axes than {axes}")
        if self.surcharge is not None and len(self.surcharge.capacity) != self.num_conditions:
            raise ValueError("the surcharge has other conditions than the parts")

    @property
    def num_conditions(self) -> int:
        return len(self.depths) + len(self.prompts)

    def figures(self, part: str, hidden_size: int, *widths: float) -> np.ndarray:
        """Return the milliseconds [conditions] of a part, never negative."""
        return np.maximum(self.parts[part].at(hidden_size, *widths), 0.0)

    def weights(self, workload: Workload) -> np.ndarray:
        """Return the weight [conditions] of each condition in a workload."""
        return _weights(self.depths, self.prompts, workload)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with milliseconds rounded to a tenth of a microsecond."""
        parts = {}
        for part, grid in self.parts.items():
            axes = {name: list(nodes) for name, nodes in zip(PARTS[part], grid.axes, strict=True)}
            parts[part] = axes | {"ms": np.round(grid.values, 7).tolist()}
        sizes = {"head_dim": self.head_dim, "depths": list(self.depths), "prompts": list(self.prompts)}
        return sizes | {"parts": parts, "surcharge": None if self.surcharge is None else self.surcharge.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LatencyTable:
        """Read the values of `to_json`. Raises KeyError, TypeError or ValueError for missing or malformed ones."""
        parts = {}
        for part, axes in PARTS.items():
            entry = values["parts"][part]
            nodes = tuple(tuple(entry[name]) for name in axes)
            parts[part] = Grid(nodes, np.array(entry["ms"]))
        surcharge = values.get("surcharge")
        return cls(
            values["head_dim"],
            tuple(values["depths"]),
            tuple(values["prompts"]),
            parts,
            None if surcharge is None else Surcharge.from_json(surcharge),
        )


@functools.lru_cache(maxsize=256)
def _weights(depths: tuple[int, ...], prompts: tuple[int, ...], workload: Workload) -> np.ndarray:
    decode = np.zeros(len(depths))
    for token in range(workload.answer_tokens):
        decode += weights_between(depths, workload.first_depth + token)
    prompt = np.zeros(len(prompts))
    if workload.prompt_tokens:
        prompt = parabola_weights(prompts, workload.prompt_tokens)  # attention's part grows with the square
    weights = np.concatenate([decode, prompt])
    weights.flags.writeable = False  # all callers share the cached array
    return weights
