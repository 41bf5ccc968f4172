"""What each kind of group costs on a device: predicted milliseconds that go with it. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from ..model.architecture import Architecture
from ..pruning.groups import BLOCKS, KINDS
from ..pruning.measures import DeviceTime

FFN_CHANNELS, STEM_CHANNELS = 256, 64
"""Taken at once: enough to see beyond the steps of a kernel."""


@dataclass(frozen=True)
class Candidate:
    """Something that may go, and the shapes that remain where it went (from one layer after the other, or once)."""

    title: str
    remaining: tuple[Architecture, ...]

    def parameters(self, source: Architecture) -> float:
        """That go with it; the mean over layers."""
        return statistics.fmean(source.num_parameters - shape.num_parameters for shape in self.remaining)

    def milliseconds(self, source: Architecture, time: DeviceTime) -> float:
        """That go with it; the mean over layers."""
        before = time.measure.of(source)
        return statistics.fmean(before - time.measure.of(shape) for shape in self.remaining)


def candidates(source: Architecture) -> list[Candidate]:
    """Every kind of group and of block, where the source has more than one of them."""
    found = [
        Candidate("a key/value group of every layer", _everywhere(source, "kv_group", lambda shape, layer: 1)),
        Candidate(
            "a query head of every group of every layer",
            _everywhere(source, "query_head", lambda shape, layer: shape.layers[layer].num_key_value_heads),
        ),
        Candidate(
            f"{FFN_CHANNELS} FFN channels of every layer", _everywhere(source, "ffn", lambda shape, layer: FFN_CHANNELS)
        ),
    ]
    if source.hidden_size > STEM_CHANNELS:
        smaller = KINDS["stem"].shrink(source, 0, STEM_CHANNELS)
        found.append(Candidate(f"{STEM_CHANNELS} stem channels", (smaller,)))
    for name, block in BLOCKS.items():
        title = "a layer" if name == "layer" else f"the {block.title}"
        layers = [layer for layer in range(len(source.layers)) if block.is_in(source, layer)]
        found.append(Candidate(title, tuple(block.without(source, layer) for layer in layers)))
    return [candidate for candidate in found if candidate.remaining]


def _everywhere(source: Architecture, name: str, count: Callable[[Architecture, int], int]) -> tuple[Architecture, ...]:
    """(what is left once every layer that has more lost so many,), or () where none has more."""
    smaller = source
    for layer in range(len(source.layers)):
        groups = count(source, layer)
        if groups < KINDS[name].count(source, layer):
            smaller = KINDS[name].shrink(smaller, layer, groups)
    return (smaller,) if smaller != source else ()
