"""Rules of removal, and the smallest shapes that they allow. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...runtime.base.errors import UsageError
from ...runtime.base.quantities import round_up
from ..model.architecture import Architecture
from ..model.groups import BLOCKS, KINDS, counts
from .measures import PARAMETERS, Measure


@dataclass(frozen=True)
class SelectionRules:
    """Rules of removal."""

    kinds: tuple[str, ...]
    width_multiple: int = 32
    """Multiple of FFN and hidden widths, in channels."""
    uniform: bool = False
    """True if every layer loses a unit at once, so that equal layers stay equal."""
    floor: Architecture | None = None
    """Smallest widths, layer by layer (an explicit target architecture)."""
    blocks: tuple[str, ...] = ()
    """Whole blocks that may be removed (see groups.BLOCKS)."""
    measure: Measure = PARAMETERS
    """Measure of the target."""
    cost: Measure | None = None
    """Measure in the ranking, if it differs."""
    fixed_rows: int = 0
    """Number of vocabulary rows that must stay."""
    fixed_stem: int = 0
    """Number of stem channels that must stay. If it is given, all others are removed before anything else."""

    @property
    def ranking_measure(self) -> Measure:
        """Return the measure that divides a unit's score."""
        return self.cost or self.measure


def smallest_architecture(architecture: Architecture, rules: SelectionRules) -> Architecture:
    """Return the smallest shape that pruning may reach.

    It has one step of every kind in every layer that has any, or in one layer if the others may be removed as a whole.
    """
    if rules.floor is not None:
        return rules.floor
    for name in rules.kinds:
        kind = KINDS[name]
        for layer, count in enumerate(counts(name, architecture)):
            step = kind.step(architecture, layer, rules.width_multiple)
            least = step
            # rows are removed by whole steps, so a few more than the fixed ones may stay
            if name == "vocabulary":
                least = round_up(max(step, rules.fixed_rows), step)
            elif name == "stem":
                least = max(step, rules.fixed_stem)
            architecture = kind.shrink(architecture, layer, max(0, count - least))
    # `can_remove_block` is asked again after each removal, so one block of every kind stays
    for name in rules.blocks:
        for layer in range(len(architecture.layers)):
            if can_remove_block(name, architecture, layer):
                architecture = BLOCKS[name].without(architecture, layer)
    return architecture


def fastest_small_architecture(architecture: Architecture, rules: SelectionRules) -> Architecture:
    """Return the fastest of the smallest shape and those with one step more FFN, more stem, or both.

    In milliseconds, the smallest shape is not the fastest if a kernel takes two steps of a width at once. A fixed stem
    stays.
    """
    least = smallest_architecture(architecture, rules)
    if rules.floor is not None:
        return least
    found = [least]
    for name in ("ffn", "stem"):
        if name in rules.kinds and not (name == "stem" and rules.fixed_stem):
            found += [_one_step_wider(shape, name, architecture, rules.width_multiple) for shape in found]
    return min(found, key=rules.measure.of)


def _one_step_wider(shape: Architecture, name: str, source: Architecture, step: int) -> Architecture:
    """Return the shape one step wider, within the source's width."""
    if name == "stem":
        return replace(shape, hidden_size=min(shape.hidden_size + step, source.hidden_size))
    layers = []
    for layer, whole in zip(shape.layers, source.layers, strict=True):
        if layer.intermediate_size:  # a removed FFN stays removed
            wider = min(layer.intermediate_size + step, whole.intermediate_size)
            layer = replace(layer, intermediate_size=wider)
        layers.append(layer)
    return replace(shape, layers=tuple(layers))


def can_remove_block(name: str, architecture: Architecture, layer: int) -> bool:
    """Tell whether a layer has such a block and is not the last one with it."""
    kind = BLOCKS[name]
    if not kind.is_in(architecture, layer):
        return False
    others = [index for index in range(len(architecture.layers)) if index != layer]

    def is_elsewhere(taken: str) -> bool:
        return any(KINDS[taken].count(architecture, index) for index in others)

    return all(is_elsewhere(taken) for taken in kind.takes)


def check_floor(architecture: Architecture, floor: Architecture) -> None:
    """Raise UsageError unless `floor` can be reached from `architecture` by removing groups."""
    if len(floor.layers) != len(architecture.layers):
        raise UsageError(
            f"--target-architecture has {len(floor.layers)} layers, the source {len(architecture.layers)}; "
            "a removed layer has 0 heads and 0 FFN channels in it"
        )
    for name in ("family", "head_dim", "vocab_size", "tie_word_embeddings"):
        if getattr(floor, name) != getattr(architecture, name):
            raise UsageError(
                f"--target-architecture has {name} {getattr(floor, name)}, the source {getattr(architecture, name)}"
            )
    if floor.hidden_size > architecture.hidden_size:
        raise UsageError(f"--target-architecture has hidden size {floor.hidden_size}, more than the source's")
    for index, (old, new) in enumerate(zip(architecture.layers, floor.layers, strict=True)):
        grows = (
            new.num_key_value_heads > old.num_key_value_heads
            # not the number of heads: a removed group takes all of its heads along, so fewer heads may still be more a
            # group
            or new.queries_per_group > old.queries_per_group
            or new.intermediate_size > old.intermediate_size
        )
        if grows:
            raise UsageError(f"--target-architecture: layer {index} ({new}) cannot be pruned from the source's ({old})")
