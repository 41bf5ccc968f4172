"""The depth-only baseline: the source without the contiguous layers that it misses least."""

from __future__ import annotations

import itertools
from dataclasses import replace

from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.pruning.blocks import Absence, BlockProbe
from efficientllm.train.pruning.measures import Measure

GONE = LayerShape(0, 0, 0)


def without_layers(architecture: Architecture, first: int, count: int) -> Architecture:
    """Return the shape whose layers `first` to `first + count - 1` are empty."""
    layers = architecture.layers
    return replace(architecture, layers=(*layers[:first], *(GONE,) * count, *layers[first + count :]))


def best_contiguous(source: Architecture, probe: BlockProbe, measure: Measure, target: float) -> Architecture:
    """Return the source without the fewest neighbouring layers that bring `measure` to `target`.

    Of all such runs of layers, it is the one with the lowest loss.
    """
    depth = len(source.layers)
    for count in range(1, depth):
        shapes = {first: without_layers(source, first, count) for first in range(depth - count + 1)}
        fitting = [first for first, shape in shapes.items() if measure.of(shape) <= target]
        if fitting:
            losses = probe.losses([_absence(first, count) for first in fitting])
            return shapes[min(zip(losses, fitting, strict=True))[1]]
    raise ValueError(f"one layer alone takes more than {measure.show(target)}")


def _absence(first: int, count: int) -> Absence:
    layers = range(first, first + count)
    return tuple(itertools.chain.from_iterable(((layer, "attention"), (layer, "ffn")) for layer in layers))
