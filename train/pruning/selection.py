"""Select groups by one ranking over layers and kinds: expected loss per unit of the measure.

A *step* is the smallest removal: `width_multiple` FFN or stem channels or vocabulary rows, one key/value group, or one
query head of every key/value group of a layer. In the uniform layout it is the least salient of these in every layer at
once. A *unit* is one removal: a step, a whole block of a layer, or the best run of steps if the measure has steps of
its own (a kernel that works on 256 channels). Its score is the expected loss of its removal divided by the freed amount
of the measure: parameters, bytes or milliseconds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..model.architecture import Architecture
from ..model.groups import BLOCKS, KINDS, counts
from .rules import SelectionRules, can_remove_block, smallest_architecture
from .running_scores import Scores

Kept = dict[str, list[Tensor]]
"""{kind: [sorted surviving positions in layer 0, ...]}; 'stem' has one entry."""

Part = tuple[int | None, tuple[int, ...]]
"""(layer, positions of the removed groups). The layer is None for groups of the whole model. A block is position 0."""


@dataclass(frozen=True)
class Unit:
    """A candidate for removal. Positions refer to the shape at the start of the ranking."""

    kind: str
    parts: tuple[Part, ...]
    """One part, or one per layer in the uniform layout."""
    freed: float
    """Parameters, bytes or milliseconds that all parts free, in the ranking's measure."""
    score: float
    """Expected loss per freed parameter, byte or millisecond."""

    @property
    def layer(self) -> int:
        """Return the first layer of its parts."""
        return self.parts[0][0] or 0


@dataclass(frozen=True)
class Removal:
    """The removal of one pruning event."""

    before: Architecture
    after: Architecture
    kept: Kept
    """Surviving groups as positions in `before`."""
    units: tuple[Unit, ...]


def all_groups(architecture: Architecture) -> Kept:
    """Return the identity: every group of every kind."""
    return {name: [torch.arange(count) for count in counts(name, architecture)] for name in KINDS}


def compose(first: Kept, then: Kept) -> Kept:
    """Return the survivors of two removals in sequence, as positions before the first."""
    composed = {}
    for kind, layers in first.items():
        composed[kind] = [before[after] for before, after in zip(layers, then[kind], strict=True)]
    return composed


class Ranking:
    """Repeated selection of the next unit, with the shape that remains.

    The cost of a unit is computed again when it may have changed. The measure is a sum over layers at a given hidden
    size.
    """

    def __init__(self, architecture: Architecture, scores: Scores, rules: SelectionRules) -> None:
        """Start with the scores of every kind and block in the rules."""
        self.architecture = architecture
        self.rules = rules
        self.floor = smallest_architecture(architecture, replace(rules, blocks=()))
        """Smallest shape for steps. Blocks are removed as a whole."""
        # on the CPU, where the positions in `kept` are: a selection is thousands of operations on a few numbers
        self._scores = {kind: [vector.double().cpu() for vector in vectors] for kind, vectors in scores.items()}
        # sorted once: scores do not change within a ranking. Equal ones stay in order, so that every rank and every
        # resumed run agrees.
        self._order = {
            kind: [vector.argsort(stable=True) for vector in vectors] for kind, vectors in self._scores.items()
        }
        self.kept = all_groups(architecture)
        """Surviving groups of every kind (also outside the rules), as positions in the given shape."""
        self._cache: dict[tuple[str, int | None], Unit | None] = {}
        self._size: float | None = None
        """Size of the current shape in the ranking's measure, or None until it is needed."""

    def rank_by_measure(self) -> None:
        """Rank by the budget's measure from now on."""
        self.rules = replace(self.rules, cost=None)
        # all costs and the size so far are in the other measure
        self._cache.clear()
        self._size = None

    def peek(self, kind: str | None = None, final_target: float | None = None) -> Unit | None:
        """Return the next unit, of any kind or of one.

        Of groups that fall below a `final_target` in parameters, the smallest is returned, and only if no other fits.
        """
        candidates = []
        for name, layer in self._keys():
            if kind is None or name == kind:
                candidates.append(self._candidate(name, layer))
        units = [unit for unit in candidates if unit is not None]
        # steps of other measures differ too much: the smallest may be a fraction of the others for the same loss
        is_counted = self.rules.measure.unit == self.rules.ranking_measure.unit == "parameters"
        groups = [unit.freed for unit in units if unit.kind in KINDS]
        if final_target is not None and is_counted and groups:
            most = max(self.architecture.num_parameters - final_target, min(groups))
            units = [unit for unit in units if unit.freed <= most or unit.kind in BLOCKS]
        # Ties (all-zero scores) are broken by position, so every rank and every resumed run agrees.
        return min(units, key=lambda unit: (unit.score, unit.kind, unit.layer), default=None)

    def peek_stem(self) -> Unit | None:
        """Return all stem channels beyond a given number as a unit, or None."""
        rules = self.rules
        excess = self.architecture.hidden_size - rules.fixed_stem
        if not rules.fixed_stem or "stem" not in rules.kinds or excess <= 0:
            return None
        run = self._run("stem", None, math.ceil(excess / rules.width_multiple))
        return self._unit("stem", *run) if run is not None else None

    def _keys(self) -> list[tuple[str, int | None]]:
        """Return (kind, layer) of every candidate. The layer is None if all layers lose at once."""
        layers = range(len(self.architecture.layers))
        keys: list[tuple[str, int | None]] = []
        for name in (*self.rules.kinds, *self.rules.blocks):
            is_group = name in KINDS
            if is_group and (KINDS[name].is_whole_model or self.rules.uniform):
                keys.append((name, None))
            else:
                keys += [(name, layer) for layer in layers]
        return keys

    def _candidate(self, name: str, layer: int | None) -> Unit | None:
        key = (name, layer)
        # None is cached as well: a candidate at its floor is not tried again until `take` drops it
        if key not in self._cache:
            if name in BLOCKS:
                assert layer is not None
                self._cache[key] = self._block(name, layer)
            else:
                self._cache[key] = self._best_run(name, layer)
        return self._cache[key]

    def _block(self, name: str, layer: int) -> Unit | None:
        if not can_remove_block(name, self.architecture, layer):
            return None
        loss = float(self._scores[name][layer].sum())
        smaller = BLOCKS[name].without(self.architecture, layer)
        return self._unit(name, ((layer, (0,)),), loss, smaller)

    def _unit(self, name: str, parts: tuple[Part, ...], loss: float, smaller: Architecture) -> Unit | None:
        """Return the unit that leaves `smaller`, or None if it frees nothing."""
        cost = self.rules.ranking_measure
        if self._size is None:
            self._size = cost.of(self.architecture)
        # a measure with padded widths may give the same size: the unit would cost loss and free nothing
        freed = self._size - cost.of(smaller)
        return Unit(name, parts, freed, loss / freed) if freed > 0 else None

    def _best_run(self, name: str, layer: int | None) -> Unit | None:
        """Return the run of steps with the lowest score. Runs are extended while shorter ones free nothing."""
        best: Unit | None = None
        for length in itertools.count(1):
            run = self._run(name, layer, length)
            if run is None:
                break
            unit = self._unit(name, *run)
            if unit is not None and (best is None or unit.score < best.score):
                best = unit
            longest = 1 if name == "vocabulary" else self.rules.ranking_measure.longest_run  # every row costs the same
            if length >= longest and best is not None:
                break
        return best

    def _run(self, name: str, layer: int | None, length: int) -> tuple[tuple[Part, ...], float, Architecture] | None:
        """Return (parts, summed scores, remaining shape) of the next `length` steps, or None beyond the floor."""
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
        """Return the surviving groups of a layer that the next `length` steps take, or None at the floor."""
        kind, shape = KINDS[name], self.architecture
        count = kind.count(shape, layer)
        if not count:
            return None
        step = kind.step(shape, layer, self.rules.width_multiple)
        first = count % step or step  # of a width that is no multiple: what is above the next one
        before = first + (length - 2) * step if length > 1 else 0
        above_floor = count - kind.least(shape, layer, self.floor)
        size = min(first + (length - 1) * step, above_floor)
        if size <= before:  # the floor leaves no more than the run before this one took
            return None
        if name == "query_head":
            return self._lowest_query_heads(layer, num_groups=step, per_group=size // step)
        order = self._order[name][layer]
        # the removed ones are always the lowest: only query heads can be removed for another reason, with their group,
        # and a removed block has no group left
        num_removed = len(order) - len(self.kept[name][layer])
        return order[num_removed : num_removed + size].sort().values

    def _lowest_query_heads(self, layer: int, num_groups: int, per_group: int) -> Tensor:
        """Return the `per_group` lowest surviving query heads of every key/value group, so that groups stay equal."""
        kept = self.kept["query_head"][layer]
        # the surviving heads lie group by group, and every group has as many, so a view splits them
        scores = self._scores["query_head"][layer][kept].view(num_groups, -1)  # [G, R]
        lowest = scores.argsort(dim=1, stable=True)[:, :per_group]
        first_of_group = torch.arange(num_groups)[:, None] * scores.shape[1]
        indices = (lowest + first_of_group).flatten()
        return kept[indices.sort().values]

    def take(self, unit: Unit) -> None:
        """Remove a unit that `peek` returned, and drop the cached candidates that it may have changed."""
        self._size = None
        if unit.kind in BLOCKS:
            self._take_block(unit.kind, unit.layer)
        else:
            self._take_groups(unit)
        self._cache = {key: found for key, found in self._cache.items() if not self._is_stale(*key, unit)}

    def _is_stale(self, name: str, layer: int | None, taken: Unit) -> bool:
        """Tell whether the candidate of a kind in a layer may differ after the removal of `taken`."""
        # The costs of all candidates after every unit would dominate the selection, so only those are computed whose
        # groups or cost changed. The measure is a sum over layers at a given hidden size, plus rows times hidden size.
        if taken.kind == "vocabulary":  # rows are a factor in the cost of stem channels, but of no layer's groups
            return layer is None
        if taken.parts[0][0] is None or self.rules.uniform:  # the hidden size or every layer changed
            return True
        if taken.kind in BLOCKS and name in BLOCKS:  # `can_remove_block` depends on the blocks of all layers
            return True
        if name == "vocabulary":  # the cost of a row depends on the hidden size alone
            return False
        # groups of one layer share its kernels and padding, so their costs change together; a stem channel (None)
        # has a part in every layer
        return layer in (taken.layer, None)

    def _take_block(self, name: str, layer: int) -> None:
        for taken in BLOCKS[name].takes:
            kinds = ("kv_group", "query_head") if taken == "kv_group" else (taken,)
            for kind in kinds:
                self.kept[kind][layer] = self.kept[kind][layer][:0]
        self.architecture = BLOCKS[name].without(self.architecture, layer)

    def _take_groups(self, unit: Unit) -> None:
        kept, kind = self.kept[unit.kind], KINDS[unit.kind]
        for layer, positions in unit.parts:
            row = layer or 0
            removed = torch.tensor(positions)
            if unit.kind == "kv_group":  # before the groups, by whose places the heads are found
                self._take_query_heads(row, removed)
            kept[row] = _without_values(kept[row], removed)
            self.architecture = kind.shrink(self.architecture, row, len(positions))

    def _take_query_heads(self, layer: int, removed: Tensor) -> None:
        """Remove the query heads of removed key/value groups. They lie group by group, [G, R], before and after."""
        groups, heads = self.kept["kv_group"][layer], self.kept["query_head"][layer]
        survives = ~torch.isin(groups, removed)
        self.kept["query_head"][layer] = heads.view(len(groups), -1)[survives].flatten()


def _without_values(values: Tensor, removed: Tensor) -> Tensor:
    """Return sorted values without the removed ones."""
    # by numpy: torch's overhead for threads is larger than the work
    indices = np.searchsorted(values.numpy(), removed.numpy())
    return torch.from_numpy(np.delete(values.numpy(), indices))


def select_removal(
    architecture: Architecture,
    scores: Scores,
    rules: SelectionRules,
    target: float,
    stop_before: Callable[[Unit, Sequence[Unit]], bool] = lambda unit, taken: False,
    final_target: float | None = None,
) -> Removal:
    """Take the units with the lowest scores in order until the rules' measure is at most `target`.

    It stops earlier before a unit for which `stop_before` (unit, taken units) holds, or when nothing more may be
    removed. `final_target` is as in `Ranking.peek`.
    """
    ranking = Ranking(architecture, scores, rules)
    units: list[Unit] = []
    while rules.measure.of(ranking.architecture) > target:
        unit = ranking.peek_stem() or ranking.peek(final_target=final_target)
        # a unit may free bytes of the budget and no millisecond of the ranking, so the target may still be in reach
        if unit is None and ranking.rules.cost is not None:
            ranking.rank_by_measure()
            unit = ranking.peek(final_target=final_target)
        if unit is None or stop_before(unit, units):
            break
        ranking.take(unit)
        units.append(unit)
    return Removal(architecture, ranking.architecture, ranking.kept, tuple(units))
