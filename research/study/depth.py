"""Shapes of baselines at a given size: the source without some neighbouring layers, and the source made narrower."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from efficientllm.train.model.architecture import Architecture
from efficientllm.train.pruning.blocks import Absence, BlockProbe, Half
from efficientllm.train.pruning.measures import Measure


def without_layers(architecture: Architecture, layers: range) -> Architecture:
    """Return the shape with these layers empty."""
    for layer in layers:
        architecture = architecture.with_layer(layer, num_attention_heads=0, num_key_value_heads=0, intermediate_size=0)
    return architecture


def best_contiguous(source: Architecture, probe: BlockProbe, measure: Measure, target: float) -> Architecture:
    """Return the source without the fewest neighbouring layers that bring `measure` to `target`.

    The first or the last of them keeps the FFN channels, and the attention, that the target allows. Of all such runs of
    layers, it is the one with the lowest loss without its missing blocks.
    """
    depth = len(source.layers)
    for count in range(1, depth):
        shapes = {first: without_layers(source, range(first, first + count)) for first in range(depth - count + 1)}
        if any(measure.of(shape) <= target for shape in shapes.values()):
            runs = (_with_a_part(source, first, count, measure, target) for first in shapes)
            found = {_absence(source, shape): shape for shape in itertools.chain.from_iterable(runs)}
            losses = [float(loss) for loss in probe.losses(list(found))]
            return found[min(zip(losses, found, strict=True))[1]]
    raise ValueError(f"one layer alone takes more than {measure.show(target)}")


def _with_a_part(
    source: Architecture, first: int, count: int, measure: Measure, target: float
) -> Iterator[Architecture]:
    """Yield the source without `count` layers, with the largest part of the first or of the last that fits."""
    for partial in (first, first + count - 1):
        shape = without_layers(source, range(first, first + count))
        if measure.of(shape) > target:
            return
        layer = source.layers[partial]
        heads = {"num_attention_heads": layer.num_attention_heads, "num_key_value_heads": layer.num_key_value_heads}
        if measure.of(shape.with_layer(partial, **heads)) <= target:
            shape = shape.with_layer(partial, **heads)
        yield _widest(shape, partial, layer.intermediate_size, measure, target)


def _widest(shape: Architecture, layer: int, most: int, measure: Measure, target: float) -> Architecture:
    """Return the shape with the most FFN channels in a layer, `most` or fewer, within the target."""
    least, above = 0, most + 1
    while above - least > 1:
        middle = (least + above) // 2
        is_within = measure.of(shape.with_layer(layer, intermediate_size=middle)) <= target
        least, above = (middle, above) if is_within else (least, middle)
    return shape.with_layer(layer, intermediate_size=least)


def _absence(source: Architecture, shape: Architecture) -> Absence:
    """Return the blocks that the shape lacks, or the FFN that it lacks a part of if it has all blocks."""
    found: list[tuple[int, Half]] = []
    for index, layer in enumerate(shape.layers):
        if not layer.num_attention_heads:
            found.append((index, "attention"))
        if not layer.intermediate_size:
            found.append((index, "ffn"))
    return tuple(found) or tuple(
        (index, "ffn") for index, layer in enumerate(shape.layers) if layer != source.layers[index]
    )


def scaled(source: Architecture, target: int) -> Architecture:
    """Return the largest shape of a uniform source's depth and proportions within `target` parameters.

    Heads become narrower and stay as many. The FFN takes up what rounding to whole heads leaves.
    """
    layer = source.layers[0]
    for head_dim in range(source.head_dim, 0, -2):  # rotary embeddings turn pairs of channels
        share = head_dim / source.head_dim
        width = round(share * layer.intermediate_size)
        shape = replace(source, head_dim=head_dim, hidden_size=round(share * source.hidden_size))
        shape = replace(shape, layers=(replace(layer, intermediate_size=width),) * len(source.layers))
        excess = target - shape.num_parameters
        if excess >= 0:
            wider = replace(layer, intermediate_size=width + 1)
            channel = shape.ffn_parameters(wider) - shape.ffn_parameters(shape.layers[0])
            wider = replace(wider, intermediate_size=width + excess // (channel * len(source.layers)))
            return replace(shape, layers=(wider,) * len(source.layers))
    raise ValueError(f"no shape of these proportions has {target:,} parameters")
