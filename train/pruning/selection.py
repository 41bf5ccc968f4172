"""Which groups go next: one global ranking over layers and group types, by expected loss per unit of the measure.

A *step* is the least that goes at once: `width_multiple` FFN or stem channels or vocabulary rows, one key/value group,
or one query head of every key/value group of a layer; with the uniform layout, the least salient of these in every
layer at once. A
*unit* is what one removal takes away: a step, a whole block of a layer, or, where the measure has steps of its own (a
kernel that works in 256 channels), the run of steps that is the best bargain. Its score is the loss expected from its
removal divided by what that frees of the measure: parameters, bytes or milliseconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...runtime.base.errors import UsageError
from ..model.architecture import Architecture
from .groups import BLOCKS, KINDS, counts
from .measures import PARAMETERS, Measure
from .running_scores import Scores

Kept = dict[str, list[Tensor]]
"""{kind: [sorted positions that survive in layer 0, ...]}; 'stem' has one entry."""

Part = tuple[int | None, tuple[int, ...]]
"""(layer, positions of the groups that go); the layer is None for groups of the whole model. A block is position 0."""


@dataclass(frozen=True)
class Unit:
    """A candidate for removal; positions refer to the shape that the ranking began with."""

    kind: str
    parts: tuple[Part, ...]
    """One part, or one per layer in the uniform layout."""
    freed: float
    """What this frees of the measure: parameters, bytes or milliseconds."""
    score: float
    """Expected loss per unit of the measure freed."""

    @property
    def layer(self) -> int:
        """The first it takes from."""
        return self.parts[0][0] or 0


@dataclass(frozen=True)
class SelectionRules:
    """What may be removed."""

    kinds: tuple[str, ...]
    width_multiple: int = 32
    """FFN and hidden widths stay multiples of this many channels."""
    uniform: bool = False
    """Whether every layer loses a unit at once, so that equal layers stay equal."""
    floor: Architecture | None = None
    """Never go below these widths, layer by layer (an explicit target architecture)."""
    blocks: tuple[str, ...] = ()
    """Whole blocks that may go (see groups.BLOCKS)."""
    measure: Measure = PARAMETERS
    """What a target is in."""
    price: Measure | None = None
    """What groups compete for, where it is something else."""
    fixed_rows: int = 0
    """Vocabulary rows that must stay."""

    @property
    def competed_for(self) -> Measure:
        """What a unit's score is divided by."""
        return self.price or self.measure


@dataclass(frozen=True)
class Removal:
    """What one pruning event takes away."""

    before: Architecture
    after: Architecture
    kept: Kept
    """Surviving groups as positions in `before`."""
    units: tuple[Unit, ...]


def all_groups(architecture: Architecture) -> Kept:
    """The identity: every group of every kind."""
    return {name: [torch.arange(count) for count in counts(name, architecture)] for name in KINDS}


def compose(first: Kept, then: Kept) -> Kept:
    """Survivors of two removals in a row, as positions before the first."""
    return {kind: [a[b] for a, b in zip(layers, then[kind], strict=True)] for kind, layers in first.items()}


def smallest_architecture(architecture: Architecture, rules: SelectionRules) -> Architecture:
    """The least that pruning may leave: one step of every kind in every layer that has any, or in one layer where the
    others may go as a whole."""
    if rules.floor is not None:
        return rules.floor
    for name in rules.kinds:
        kind = KINDS[name]
        for layer, count in enumerate(counts(name, architecture)):
            step = kind.step(architecture, layer, rules.width_multiple)
            least = step if name != "vocabulary" else -(-max(step, rules.fixed_rows) // step) * step
            architecture = kind.shrink(architecture, layer, max(0, count - least))
    for name in rules.blocks:
        for layer in range(len(architecture.layers)):
            if may_go(name, architecture, layer):
                architecture = BLOCKS[name].without(architecture, layer)
    return architecture


def fastest_of_the_smallest(architecture: Architecture, rules: SelectionRules) -> Architecture:
    """The best of the smallest shape and those of one step more FFN, more stem, or both: in milliseconds the smallest
    is not the least where a kernel takes two steps of a width at once."""
    least = smallest_architecture(architecture, rules)
    if rules.floor is not None:
        return least
    found = [least]
    for name in (name for name in ("ffn", "stem") if name in rules.kinds):
        found += [_a_step_wider(shape, name, architecture, rules.width_multiple) for shape in found]
    return min(found, key=rules.measure.of)


def _a_step_wider(shape: Architecture, name: str, source: Architecture, step: int) -> Architecture:
    """As far as the source goes."""
    if name == "stem":
        return replace(shape, hidden_size=min(shape.hidden_size + step, source.hidden_size))
    layers = tuple(
        replace(layer, intermediate_size=min(layer.intermediate_size + step, whole.intermediate_size))
        if layer.intermediate_size
        else layer
        for layer, whole in zip(shape.layers, source.layers, strict=True)
    )
    return replace(shape, layers=layers)


def may_go(name: str, architecture: Architecture, layer: int) -> bool:
    """Whether a layer has such a block and is not the last that has one."""
    kind = BLOCKS[name]
    if not kind.is_in(architecture, layer):
        return False
    others = [index for index in range(len(architecture.layers)) if index != layer]
    return all(any(KINDS[taken].count(architecture, index) for index in others) for taken in kind.takes)


def check_floor(architecture: Architecture, floor: Architecture) -> None:
    """UsageError unless `floor` can be reached from `architecture` by removing groups."""
    if len(floor.layers) != len(architecture.layers):
        raise UsageError(
            f"--target-architecture has {len(floor.layers)} layers, the source {len(architecture.layers)}; "
            "a layer that is to go has 0 heads and 0 FFN channels there"
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
            or new.queries_per_group > old.queries_per_group
            or new.intermediate_size > old.intermediate_size
        )
        if grows:
            raise UsageError(f"--target-architecture: layer {index} ({new}) cannot be pruned from the source's ({old})")


class Ranking:
    """What goes next, again and again, and the shape that remains.

    A unit is priced again where its price may have changed: the measure is a sum over layers at a given hidden size.
    """

    def __init__(self, architecture: Architecture, scores: Scores, rules: SelectionRules) -> None:
        """`scores` of every kind and block in the rules."""
        self.architecture = architecture
        self.rules = rules
        self.floor = smallest_architecture(architecture, replace(rules, blocks=()))
        """What steps may leave; blocks go as a whole."""
        self._scores = {kind: [vector.double().cpu() for vector in vectors] for kind, vectors in scores.items()}
        # equal ones stay in order, so that every rank and every resumed run agrees
        self._order = {
            kind: [vector.argsort(stable=True) for vector in vectors] for kind, vectors in self._scores.items()
        }
        self.kept = all_groups(architecture)
        """Surviving groups of every kind (also those outside the rules), as positions in the shape given."""
        self._cache: dict[tuple[str, int | None], Unit | None] = {}
        self._size: float | None = None
        """Of the shape at hand, in what groups compete for; None until it is asked for."""

    def compete_for_the_measure(self) -> None:
        """From now on for what the budget is in, whatever it was for."""
        self.rules = replace(self.rules, price=None)
        self._cache.clear()
        self._size = None

    def peek(self, kind: str | None = None) -> Unit | None:
        """The unit that would go next, of any kind or of one."""
        keys = [key for key in self._keys() if kind is None or key[0] == kind]
        candidates = [unit for key in keys if (unit := self._candidate(*key)) is not None]
        # Ties (all-zero scores) are broken by position, so every rank and every resumed run agrees.
        return min(candidates, key=lambda unit: (unit.score, unit.kind, unit.layer), default=None)

    def _keys(self) -> list[tuple[str, int | None]]:
        """(kind, layer) of every candidate; the layer is None where all of them, or the whole model, lose at once."""
        layers = range(len(self.architecture.layers))
        keys: list[tuple[str, int | None]] = []
        for name in self.rules.kinds:
            at_once = KINDS[name].is_whole_model or self.rules.uniform
            keys += [(name, None)] if at_once else [(name, layer) for layer in layers]
        return keys + [(name, layer) for name in self.rules.blocks for layer in layers]

    def _candidate(self, name: str, layer: int | None) -> Unit | None:
        key = (name, layer)
        if key not in self._cache:
            if name in BLOCKS:
                assert layer is not None
                self._cache[key] = self._block(name, layer)
            else:
                self._cache[key] = self._best_run(name, layer)
        return self._cache[key]

    def _block(self, name: str, layer: int) -> Unit | None:
        if not may_go(name, self.architecture, layer):
            return None
        loss = float(self._scores[name][layer].sum())
        return self._unit(name, ((layer, (0,)),), loss, BLOCKS[name].without(self.architecture, layer))

    def _unit(self, name: str, parts: tuple[Part, ...], loss: float, smaller: Architecture) -> Unit | None:
        """What leaves `smaller`; None where that frees nothing: it would only cost."""
        price = self.rules.competed_for
        if self._size is None:
            self._size = price.of(self.architecture)
        freed = self._size - price.of(smaller)
        return Unit(name, parts, freed, loss / freed) if freed > 0 else None

    def _best_run(self, name: str, layer: int | None) -> Unit | None:
        """The run of steps with the lowest score; runs are followed on where shorter ones free nothing."""
        best: Unit | None = None
        for length in itertools.count(1):
            run = self._run(name, layer, length)
            if run is None:
                break
            unit = self._unit(name, *run)
            if unit is not None and (best is None or unit.score < best.score):
                best = unit
            longest = 1 if name == "vocabulary" else self.rules.competed_for.longest_run  # every row costs the same
            if length >= longest and best is not None:
                break
        return best

    def _run(self, name: str, layer: int | None, length: int) -> tuple[tuple[Part, ...], float, Architecture] | None:
        """(parts, summed scores, shape that is left) of the next `length` steps; None beyond the floor."""
        kind, layers = KINDS[name], [layer]
        if layer is None and not kind.is_whole_model:
            layers = list(range(len(self.architecture.layers)))
        smaller, total, parts = self.architecture, 0.0, []
        for index in layers:
            row = index or 0
            positions = self._lowest(name, row, length)
            if positions is None:
                return None
            total += float(self._scores[name][row][positions].sum())
            parts.append((index, tuple(positions.tolist())))
            smaller = kind.shrink(smaller, row, len(positions))
        return tuple(parts), total, smaller

    def _lowest(self, name: str, layer: int, length: int) -> Tensor | None:
        """Surviving groups of a layer that the next `length` steps take; None where the last of them takes nothing, at
        the floor."""
        kind, shape = KINDS[name], self.architecture
        count = kind.count(shape, layer)
        if not count:
            return None
        step = kind.step(shape, layer, self.rules.width_multiple)
        first = count % step or step  # of a width that is no multiple: what is above the next one
        before = first + (length - 2) * step if length > 1 else 0
        size = min(first + (length - 1) * step, count - kind.least(shape, layer, self.floor))
        if size <= before:
            return None
        kept = self.kept[name][layer]
        if name == "query_head":  # as many of every key/value group, [G * R] -> [G, n], so that groups stay equal
            per_group = self._scores[name][layer][kept].view(step, -1)
            lowest = per_group.argsort(dim=1, stable=True)[:, : size // step]
            return kept[(lowest + torch.arange(step)[:, None] * per_group.shape[1]).flatten().sort().values]
        gone = len(self._order[name][layer]) - len(kept)  # always the lowest
        return self._order[name][layer][gone : gone + size].sort().values

    def take(self, unit: Unit) -> None:
        """Remove a unit that `peek` gave."""
        self._size = None
        if unit.kind in BLOCKS:
            self._take_block(unit.kind, unit.layer)
        else:
            self._take_groups(unit)
        if unit.kind == "vocabulary":  # which no other price depends on but those of the whole model
            self._cache = {key: found for key, found in self._cache.items() if key[1] is not None}
            return
        if unit.parts[0][0] is None or self.rules.uniform:
            self._cache.clear()
            return
        if unit.kind in BLOCKS:  # the last of its kind must stay, wherever that is
            self._cache = {key: found for key, found in self._cache.items() if key[0] not in BLOCKS}
        # the parts of a layer share its price, and every layer has a part in that of a stem channel, none in a row's
        stale = (unit.layer, None)
        self._cache = {
            key: found for key, found in self._cache.items() if key[1] not in stale or key[0] == "vocabulary"
        }

    def _take_block(self, name: str, layer: int) -> None:
        for taken in BLOCKS[name].takes:
            for kind in ("kv_group", "query_head") if taken == "kv_group" else (taken,):
                self.kept[kind][layer] = self.kept[kind][layer][:0]
        self.architecture = BLOCKS[name].without(self.architecture, layer)

    def _take_groups(self, unit: Unit) -> None:
        for layer, positions in unit.parts:
            row, removed = layer or 0, torch.tensor(positions)
            if unit.kind == "kv_group":
                self._take_query_heads(row, removed)
            self.kept[unit.kind][row] = _without_values(self.kept[unit.kind][row], removed)
            self.architecture = KINDS[unit.kind].shrink(self.architecture, row, len(positions))

    def _take_query_heads(self, layer: int, removed: Tensor) -> None:
        """Query heads go with their key/value group. They lie group by group, [G, R], before and after."""
        groups, heads = self.kept["kv_group"][layer], self.kept["query_head"][layer]
        survives = ~torch.isin(groups, removed)
        self.kept["query_head"][layer] = heads.view(len(groups), -1)[survives].flatten()


def _without_values(values: Tensor, removed: Tensor) -> Tensor:
    """Of sorted values, some of which are removed; by numpy, as threads cost more than they bring here."""
    return torch.from_numpy(np.delete(values.numpy(), np.searchsorted(values.numpy(), removed.numpy())))


def select_removal(
    architecture: Architecture,
    scores: Scores,
    rules: SelectionRules,
    target: float,
    max_units: int | None = None,
    stop_before: Callable[[Unit, Sequence[Unit]], bool] = lambda unit, taken: False,
) -> Removal:
    """Take the lowest-scored units, in order, until the rules' measure is at most `target`.

    Stops earlier after `max_units`, before a unit for which `stop_before` (unit, those taken) holds, or when nothing
    more may go.
    """
    ranking = Ranking(architecture, scores, rules)
    units: list[Unit] = []
    while rules.measure.of(ranking.architecture) > target and (max_units is None or len(units) < max_units):
        unit = ranking.peek()
        if unit is None and ranking.rules.price is not None:  # nothing more frees what groups competed for
            ranking.compete_for_the_measure()
            unit = ranking.peek()
        if unit is None or stop_before(unit, units):
            break
        ranking.take(unit)
        units.append(unit)
    return Removal(architecture, ranking.architecture, ranking.kept, tuple(units))
