"""The latency table: a grid of measured milliseconds for every part of a decoder.

The last axis of every grid is the condition: first decoding one token at each of `depths`, then evaluating a prompt of
each of `prompts` tokens. A workload is a weight for each condition, since milliseconds between two depths are
interpolated linearly, and those between lengths of a prompt by a parabola: attention's grow with the square.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from .grid import Grid, parabola_weights, weights_between
from .surcharge import Surcharge
from .workload import Workload

PARTS = {
    "token": ("hidden_size",),
    "head": ("hidden_size", "vocab_size"),
    "attention": ("hidden_size", "num_key_value_heads", "queries_per_group"),
    "no_attention": ("hidden_size",),
    "ffn": ("hidden_size", "intermediate_size"),
    "no_ffn": ("hidden_size",),
}
"""Part -> the axes of its grid. no_attention and no_ffn: what a layer still costs where it lacks that part alone."""


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of each part, by the widths that decide them and by condition."""

    head_dim: int
    """Channels of one attention head of all that was measured."""
    depths: tuple[int, ...]
    """Tokens in the cache at which decoding was measured, ascending."""
    prompts: tuple[int, ...]
    """Lengths at which prefill was measured, ascending."""
    parts: dict[str, Grid]
    """One for each of PARTS, without what a surcharge adds."""
    surcharge: Surcharge | None = None
    """None: an earlier release's table, which has none."""

    def __post_init__(self) -> None:
        if not self.depths or not self.prompts or self.head_dim < 1:
            raise ValueError("a table needs heads, depths and prompts")
        for nodes in (self.depths, self.prompts):
            if list(nodes) != sorted(set(nodes)):
                raise ValueError(f"{nodes} are not ascending")
        for part, axes in PARTS.items():
            grid = self.parts.get(part)
            if grid is None or len(grid.axes) != len(axes) or grid.values.shape[-1] != self.num_conditions:
                raise ValueError(f"part {part!r} is missing or of other axes than {axes}")
        if self.surcharge is not None and len(self.surcharge.capacity) != self.num_conditions:
            raise ValueError("the surcharge is of other conditions than the parts")

    @property
    def num_conditions(self) -> int:
        return len(self.depths) + len(self.prompts)

    def figures(self, part: str, hidden_size: int, *widths: float) -> np.ndarray:
        """Milliseconds [conditions] of a part, never negative."""
        return np.maximum(self.parts[part].at(hidden_size, *widths), 0.0)

    def weights(self, workload: Workload) -> np.ndarray:
        """Weight [conditions] of each condition in a workload."""
        return _weights(self.depths, self.prompts, workload)

    def to_json(self) -> dict[str, Any]:
        """Plain values, milliseconds rounded to a tenth of a microsecond."""
        parts = {
            part: {name: list(nodes) for name, nodes in zip(PARTS[part], grid.axes, strict=True)}
            | {"ms": np.round(grid.values, 7).tolist()}
            for part, grid in self.parts.items()
        }
        sizes = {"head_dim": self.head_dim, "depths": list(self.depths), "prompts": list(self.prompts)}
        return sizes | {"parts": parts, "surcharge": None if self.surcharge is None else self.surcharge.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LatencyTable:
        """The inverse of `to_json`; KeyError, TypeError or ValueError where something is missing or malformed."""
        parts = {}
        for part, axes in PARTS.items():
            entry = values["parts"][part]
            parts[part] = Grid(tuple(tuple(entry[name]) for name in axes), np.array(entry["ms"]))
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
    weights.flags.writeable = False
    return weights
