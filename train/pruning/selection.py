"""Which groups go next: one global ranking over layers and group types, by saliency per parameter.

A *unit* is what one removal takes away: `width_multiple` FFN or stem channels, one key/value group, or one query head
of every key/value group of a layer; with the uniform layout, the least salient of these in every layer at once. Its
score is the sum of its groups' scores divided by the parameters it frees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.base.errors import UsageError
from ..model.architecture import Architecture
from .groups import KINDS, counts
from .running_scores import Scores

Kept = dict[str, list[Tensor]]
"""{kind: [sorted positions that survive in layer 0, ...]}; 'stem' has one entry."""

Part = tuple[int | None, tuple[int, ...]]
"""(layer, positions of the groups that go); the layer is None for groups of the whole model."""


@dataclass(frozen=True)
class Unit:
    """A candidate for removal; positions refer to the shape that the ranking began with."""

    kind: str
    parts: tuple[Part, ...]
    """One part, or one per layer in the uniform layout."""
    num_parameters: int
    """Parameters this frees."""
    score: float
    """Saliency per parameter freed."""


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
    """The least that pruning may leave: one step of every kind in every layer that has any."""
    if rules.floor is not None:
        return rules.floor
    for name in rules.kinds:
        kind = KINDS[name]
        for layer, count in enumerate(counts(name, architecture)):
            least = kind.step(architecture, layer, rules.width_multiple)
            architecture = kind.shrink(architecture, layer, max(0, count - least))
    return architecture


def check_floor(architecture: Architecture, floor: Architecture) -> None:
    """UsageError unless `floor` can be reached from `architecture` by removing groups."""
    if len(floor.layers) != len(architecture.layers):
        raise UsageError(
            f"--target-architecture has {len(floor.layers)} layers, the source {len(architecture.layers)}; "
            "layers are not removed"
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
        if grows or (new.num_key_value_heads == 0) != (old.num_key_value_heads == 0):
            raise UsageError(f"--target-architecture: layer {index} ({new}) cannot be pruned from the source's ({old})")


class Ranking:
    """Repeatedly takes the unit of lowest score, keeping track of the shape that remains."""

    def __init__(self, architecture: Architecture, scores: Scores, rules: SelectionRules) -> None:
        self.architecture = architecture
        self.rules = rules
        self.floor = smallest_architecture(architecture, rules)
        self._scores = {kind: [vector.double().cpu() for vector in vectors] for kind, vectors in scores.items()}
        self.kept = all_groups(architecture)
        """Surviving groups of every kind (also those outside the rules), as positions in the shape given."""
        self._cache: dict[tuple[str, int | None], Unit | None] = {}

    def pop(self) -> Unit | None:
        """Remove and return the unit of lowest score, or None when nothing more may go."""
        best = self.peek()
        if best is not None:
            self._take(best)
        return best

    def peek(self, kind: str | None = None) -> Unit | None:
        """The unit that would go next, of any kind or of one."""
        keys = [key for key in self._keys() if kind is None or key[0] == kind]
        candidates = [unit for key in keys if (unit := self._candidate(*key)) is not None]
        # Ties (all-zero scores) are broken by position, so every rank and every resumed run agrees.
        return min(candidates, key=lambda unit: (unit.score, unit.kind, unit.parts[0][0] or 0), default=None)

    def _keys(self) -> list[tuple[str, int | None]]:
        """(kind, layer) of every candidate; the layer is None where all of them, or the whole model, lose at once."""
        layers = range(len(self.architecture.layers))
        keys: list[tuple[str, int | None]] = []
        for name in self.rules.kinds:
            at_once = KINDS[name].is_whole_model or self.rules.uniform
            keys += [(name, None)] if at_once else [(name, layer) for layer in layers]
        return keys

    def _candidate(self, name: str, layer: int | None) -> Unit | None:
        key = (name, layer)
        if key not in self._cache:
            self._cache[key] = self._build(name, layer)
        return self._cache[key]

    def _build(self, name: str, layer: int | None) -> Unit | None:
        kind, layers = KINDS[name], [layer]
        if layer is None and not kind.is_whole_model:
            layers = list(range(len(self.architecture.layers)))
        smaller, total, parts = self.architecture, 0.0, []
        for index in layers:
            row = index or 0
            places = self._lowest(name, row)
            if places is None:
                return None
            positions = self.kept[name][row][places]
            total += float(self._scores[name][row][positions].sum())
            parts.append((index, tuple(positions.tolist())))
            smaller = kind.shrink(smaller, row, len(positions))
        freed = self.architecture.num_parameters - smaller.num_parameters
        return Unit(name, tuple(parts), freed, total / freed)

    def _lowest(self, name: str, layer: int) -> Tensor | None:
        """Places among the surviving groups of a layer that the next unit takes, or None at the floor."""
        kind, shape = KINDS[name], self.architecture
        count = kind.count(shape, layer)
        if not count:
            return None
        step = kind.step(shape, layer, self.rules.width_multiple)
        # the first unit of a width that is no multiple takes what is above the next one
        size = min(count % step or step, count - kind.least(shape, layer, self.floor))
        if size <= 0:
            return None
        values = self._scores[name][layer][self.kept[name][layer]]
        if name == "query_head":  # one of every key/value group, [G * R] -> [G], so that groups stay equal
            per_group = values.view(step, -1)
            return per_group.argmin(dim=1) + torch.arange(step) * per_group.shape[1]
        return values.argsort(stable=True)[:size].sort().values

    def _take(self, unit: Unit) -> None:
        kind = KINDS[unit.kind]
        for layer, positions in unit.parts:
            row, removed = layer or 0, torch.tensor(positions)
            if unit.kind == "kv_group":
                self._take_query_heads(row, removed)
            self.kept[unit.kind][row] = _without_values(self.kept[unit.kind][row], removed)
            self.architecture = kind.shrink(self.architecture, row, len(positions))
        if kind.is_whole_model or self.rules.uniform:
            self._cache.clear()
            return
        for name, other in KINDS.items():
            if other.flag == kind.flag:  # they share tensors, so what one takes changes the other's cost
                self._cache.pop((name, unit.parts[0][0]), None)
            elif other.is_whole_model:  # a stem channel's cost depends on every layer
                self._cache.pop((name, None), None)

    def _take_query_heads(self, layer: int, removed: Tensor) -> None:
        """Query heads go with their key/value group. They lie group by group, [G, R], before and after."""
        groups, heads = self.kept["kv_group"][layer], self.kept["query_head"][layer]
        survives = ~torch.isin(groups, removed)
        self.kept["query_head"][layer] = heads.view(len(groups), -1)[survives].flatten()


def _without_values(values: Tensor, removed: Tensor) -> Tensor:
    return values[~torch.isin(values, removed)]


def select_removal(
    architecture: Architecture,
    scores: Scores,
    rules: SelectionRules,
    target: int,
    measure: Callable[[Architecture], int] = lambda architecture: architecture.num_parameters,
    max_units: int | None = None,
) -> Removal:
    """Take the lowest-scored units, in order, until `measure` (parameters, or bytes) is at most `target`.

    Stops earlier after `max_units`, or when nothing more may go.
    """
    ranking = Ranking(architecture, scores, rules)
    units: list[Unit] = []
    while measure(ranking.architecture) > target and (max_units is None or len(units) < max_units):
        unit = ranking.pop()
        if unit is None:
            break
        units.append(unit)
    return Removal(architecture, ranking.architecture, ranking.kept, tuple(units))
