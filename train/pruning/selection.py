"""Which groups go next: one global ranking over layers and group types, by saliency per parameter.

A *unit* is what one removal takes away: `width_multiple` FFN or stem channels, one key/value group, or one query head
of every key/value group of a layer; with the uniform layout, the least salient of these in every layer at once. Its
score is the sum of its groups' scores divided by the parameters it frees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...runtime.base.errors import UsageError
from ..model.architecture import Architecture, LayerShape
from .saliency import Scores

Kept = dict[str, list[Tensor]]
"""{kind: [sorted positions that survive in layer 0, ...]}; 'stem' has one entry."""

HEAD_KINDS = ("kv_group", "query_head")

Part = tuple[int | None, tuple[int, ...]]
"""(layer, positions of the groups that go); the layer is None for stem channels."""


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
    layers = architecture.layers
    return {
        "kv_group": [torch.arange(layer.num_key_value_heads) for layer in layers],
        "query_head": [torch.arange(layer.num_attention_heads) for layer in layers],
        "ffn": [torch.arange(layer.intermediate_size) for layer in layers],
        "stem": [torch.arange(architecture.hidden_size)],
    }


def compose(first: Kept, then: Kept) -> Kept:
    """Survivors of two removals in a row, as positions before the first."""
    return {kind: [a[b] for a, b in zip(layers, then[kind], strict=True)] for kind, layers in first.items()}


def smallest_architecture(architecture: Architecture, rules: SelectionRules) -> Architecture:
    """The least that pruning may leave: one key/value group with one query head, one multiple of channels."""
    if rules.floor is not None:
        return rules.floor
    layers = []
    for layer in architecture.layers:
        groups, per_group, width = layer.num_key_value_heads, layer.queries_per_group, layer.intermediate_size
        if "kv_group" in rules.kinds:
            groups = min(groups, 1)
        if "query_head" in rules.kinds:
            per_group = min(per_group, 1)
        if "ffn" in rules.kinds:
            width = min(width, rules.width_multiple)
        layers.append(LayerShape(groups * per_group, groups, width))
    hidden = min(architecture.hidden_size, rules.width_multiple) if "stem" in rules.kinds else architecture.hidden_size
    return replace(architecture, hidden_size=hidden, layers=tuple(layers))


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
        keys: list[tuple[str, int | None]] = []
        for kind in self.rules.kinds:
            whole_model = kind == "stem" or self.rules.uniform
            keys += [(kind, None)] if whole_model else [(kind, i) for i in range(len(self.architecture.layers))]
        return keys

    def _candidate(self, kind: str, layer: int | None) -> Unit | None:
        key = (kind, layer)
        if key not in self._cache:
            self._cache[key] = self._build(kind, layer)
        return self._cache[key]

    def _build(self, kind: str, layer: int | None) -> Unit | None:
        layers: list[int | None] = [layer]
        if layer is None and kind != "stem":
            layers = list(range(len(self.architecture.layers)))
        smaller, total, parts = self.architecture, 0.0, []
        for index in layers:
            positions = self._lowest(kind, index)
            if positions is None:
                return None
            row = index or 0
            total += float(self._scores[kind][row][self.kept[kind][row][positions]].sum())
            parts.append((index, tuple(self.kept[kind][row][positions].tolist())))
            smaller = without(smaller, kind, index, len(positions))
        freed = self.architecture.num_parameters - smaller.num_parameters
        return Unit(kind, tuple(parts), freed, total / freed)

    def _lowest(self, kind: str, layer: int | None) -> Tensor | None:
        """Places among the surviving groups that the next unit of this kind takes, or None at the floor."""
        row = layer or 0
        values = self._scores[kind][row][self.kept[kind][row]]
        if kind in ("ffn", "stem"):
            least = self.floor.hidden_size if layer is None else self.floor.layers[layer].intermediate_size
            count = len(values) % self.rules.width_multiple or self.rules.width_multiple
            count = min(count, len(values) - least)
            return None if count <= 0 else values.argsort(stable=True)[:count].sort().values
        assert layer is not None
        shape, least_shape = self.architecture.layers[layer], self.floor.layers[layer]
        if kind == "kv_group":
            may_go = shape.num_key_value_heads > max(1, least_shape.num_key_value_heads)
            return values.argsort(stable=True)[:1] if may_go else None
        if shape.queries_per_group <= max(1, least_shape.queries_per_group):
            return None
        groups = shape.num_key_value_heads
        return values.view(groups, -1).argmin(dim=1) + torch.arange(groups) * shape.queries_per_group

    def _take(self, unit: Unit) -> None:
        for layer, positions in unit.parts:
            row, gone = layer or 0, torch.tensor(positions)
            if unit.kind in HEAD_KINDS:
                self._take_heads(unit.kind, row, gone)
            else:
                self.kept[unit.kind][row] = _without_values(self.kept[unit.kind][row], gone)
            self.architecture = without(self.architecture, unit.kind, layer, len(positions))
        if unit.kind == "stem" or self.rules.uniform:
            self._cache.clear()
            return
        for kind in HEAD_KINDS if unit.kind in HEAD_KINDS else (unit.kind,):
            self._cache.pop((kind, unit.parts[0][0]), None)
        self._cache.pop(("stem", None), None)  # a stem channel's cost depends on every layer

    def _take_heads(self, kind: str, row: int, gone: Tensor) -> None:
        """Keep the query-head and key/value-group bookkeeping of one layer consistent."""
        groups, heads = self.kept["kv_group"][row], self.kept["query_head"][row]
        if kind == "query_head":
            self.kept["query_head"][row] = _without_values(heads, gone)
            return
        survives = ~torch.isin(groups, gone)
        self.kept["query_head"][row] = heads.view(len(groups), -1)[survives].flatten()
        self.kept["kv_group"][row] = groups[survives]


def without(architecture: Architecture, kind: str, layer: int | None, count: int) -> Architecture:
    """The shape once `count` groups of a layer are gone."""
    if layer is None:
        return replace(architecture, hidden_size=architecture.hidden_size - count)
    shape = architecture.layers[layer]
    if kind == "ffn":
        return architecture.with_layer(layer, intermediate_size=shape.intermediate_size - count)
    heads = shape.num_attention_heads - (count * shape.queries_per_group if kind == "kv_group" else count)
    groups = shape.num_key_value_heads - (count if kind == "kv_group" else 0)
    return architecture.with_layer(layer, num_attention_heads=heads, num_key_value_heads=groups)


def _without_values(values: Tensor, gone: Tensor) -> Tensor:
    return values[~torch.isin(values, gone)]


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
