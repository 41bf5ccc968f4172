"""Which groups go next: one global ranking over layers and group types, by saliency per parameter.

A *unit* is what one removal takes away: `width_multiple` FFN or stem channels, one key/value group, or one query head
of every key/value group of a layer. Its score is the sum of its groups' scores divided by the parameters it frees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..runtime.errors import UsageError
from .architecture import Architecture
from .saliency import Scores

Kept = dict[str, list[Tensor]]
"""{kind: [sorted positions that survive in layer 0, ...]}; 'stem' has one entry."""

HEAD_KINDS = ("kv_group", "query_head")


@dataclass(frozen=True)
class Unit:
    """A candidate for removal; indices are positions in the current (already pruned) layer."""

    kind: str
    layer: int | None
    """None for stem channels."""
    indices: tuple[int, ...]
    """Groups of this kind that go: channels, key/value heads or query heads."""
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
    floor: Architecture | None = None
    """Never go below these widths, layer by layer (an explicit target architecture)."""


def smallest_architecture(architecture: Architecture, rules: SelectionRules) -> Architecture:
    """The least that pruning may leave: one key/value group with one query head, one multiple of channels."""
    if rules.floor is not None:
        return rules.floor
    layers = []
    for layer in architecture.layers:
        heads, groups, width = layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size
        if heads and "kv_group" in rules.kinds:
            heads, groups = heads // groups, 1
        if heads and "query_head" in rules.kinds:
            heads = groups
        if "ffn" in rules.kinds:
            width = min(width, rules.width_multiple)
        layers.append(replace(layer, num_attention_heads=heads, num_key_value_heads=groups, intermediate_size=width))
    hidden = min(architecture.hidden_size, rules.width_multiple) if "stem" in rules.kinds else architecture.hidden_size
    return replace(architecture, hidden_size=hidden, layers=tuple(layers))


def check_target(architecture: Architecture, rules: SelectionRules, target_params: int) -> None:
    """UsageError where `target_params` is more than the model has or less than pruning may leave."""
    if target_params > architecture.num_parameters:
        raise UsageError(
            f"the target of {target_params:,} parameters is larger than the source's "
            f"{architecture.num_parameters:,}; choose a smaller one"
        )
    least = smallest_architecture(architecture, rules).num_parameters
    if target_params < least:
        raise UsageError(
            f"the target of {target_params:,} parameters is too small: one group per layer already takes {least:,} "
            f"with --prune {','.join(rules.kinds)}; raise the target or prune more group types"
        )


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
        candidates = [unit for key in self._keys() if (unit := self._candidate(*key)) is not None]
        if not candidates:
            return None
        # Ties (all-zero scores) are broken by position, so every rank and every resumed run agrees.
        best = min(candidates, key=lambda unit: (unit.score, unit.kind, -1 if unit.layer is None else unit.layer))
        self._take(best)
        return best

    def _keys(self) -> list[tuple[str, int | None]]:
        keys: list[tuple[str, int | None]] = []
        for kind in self.rules.kinds:
            keys += [(kind, None)] if kind == "stem" else [(kind, i) for i in range(len(self.architecture.layers))]
        return keys

    def _candidate(self, kind: str, layer: int | None) -> Unit | None:
        key = (kind, layer)
        if key not in self._cache:
            self._cache[key] = self._build(kind, layer)
        return self._cache[key]

    def _build(self, kind: str, layer: int | None) -> Unit | None:
        positions = self._lowest(kind, layer)
        if positions is None:
            return None
        smaller = self._without(kind, layer, len(positions))
        row = 0 if layer is None else layer
        freed = self.architecture.num_parameters - smaller.num_parameters
        score = float(self._scores[kind][row][self.kept[kind][row][positions]].sum()) / freed
        indices = tuple(self.kept[kind][row][positions].tolist())
        return Unit(kind, layer, indices, freed, score)

    def _lowest(self, kind: str, layer: int | None) -> Tensor | None:
        """Positions among the living groups that the next unit of this kind takes, or None at the floor."""
        row = 0 if layer is None else layer
        alive = self.kept[kind][row]
        values = self._scores[kind][row][alive]
        if kind in ("ffn", "stem"):
            least = self.floor.hidden_size if layer is None else self.floor.layers[layer].intermediate_size
            count = len(alive) % self.rules.width_multiple or self.rules.width_multiple
            count = min(count, len(alive) - least)
            return None if count <= 0 else values.argsort(stable=True)[:count].sort().values
        assert layer is not None
        shape, least_shape = self.architecture.layers[layer], self.floor.layers[layer]
        if kind == "kv_group":
            smaller_heads = shape.num_attention_heads - shape.queries_per_group
            if shape.num_key_value_heads <= max(1, least_shape.num_key_value_heads) or (
                smaller_heads < least_shape.num_attention_heads
            ):
                return None
            return values.argsort(stable=True)[:1]
        groups = shape.num_key_value_heads
        if groups == 0 or shape.num_attention_heads - groups < max(groups, least_shape.num_attention_heads):
            return None
        return values.view(groups, -1).argmin(dim=1) + torch.arange(groups) * shape.queries_per_group

    def _without(self, kind: str, layer: int | None, count: int) -> Architecture:
        if layer is None:
            return replace(self.architecture, hidden_size=self.architecture.hidden_size - count)
        shape = self.architecture.layers[layer]
        if kind == "ffn":
            return self.architecture.with_layer(layer, intermediate_size=shape.intermediate_size - count)
        heads = shape.num_attention_heads - (shape.queries_per_group if kind == "kv_group" else count)
        groups = shape.num_key_value_heads - (count if kind == "kv_group" else 0)
        return self.architecture.with_layer(layer, num_attention_heads=heads, num_key_value_heads=groups)

    def _take(self, unit: Unit) -> None:
        row = 0 if unit.layer is None else unit.layer
        gone = torch.tensor(unit.indices)
        if unit.kind in HEAD_KINDS:
            self._take_heads(unit, row, gone)
        else:
            self.kept[unit.kind][row] = _without_values(self.kept[unit.kind][row], gone)
        self.architecture = self._without(unit.kind, unit.layer, len(unit.indices))
        if unit.layer is None:
            self._cache.clear()
            return
        stale = HEAD_KINDS if unit.kind in HEAD_KINDS else (unit.kind,)
        for kind in stale:
            self._cache.pop((kind, unit.layer), None)
        self._cache.pop(("stem", None), None)  # a stem channel's cost depends on every layer

    def _take_heads(self, unit: Unit, row: int, gone: Tensor) -> None:
        """Keep the query-head and key/value-group bookkeeping of one layer consistent."""
        groups, heads = self.kept["kv_group"][row], self.kept["query_head"][row]
        if unit.kind == "query_head":
            self.kept["query_head"][row] = _without_values(heads, gone)
            return
        survives = ~torch.isin(groups, gone)
        self.kept["query_head"][row] = heads.view(len(groups), -1)[survives].flatten()
        self.kept["kv_group"][row] = groups[survives]


def _without_values(values: Tensor, gone: Tensor) -> Tensor:
    return values[~torch.isin(values, gone)]


def all_groups(architecture: Architecture) -> Kept:
    """The identity: every group of every kind."""
    layers = architecture.layers
    return {
        "kv_group": [torch.arange(layer.num_key_value_heads) for layer in layers],
        "query_head": [torch.arange(layer.num_attention_heads) for layer in layers],
        "ffn": [torch.arange(layer.intermediate_size) for layer in layers],
        "stem": [torch.arange(architecture.hidden_size)],
    }


@dataclass(frozen=True)
class Removal:
    """What one pruning event takes away."""

    before: Architecture
    after: Architecture
    kept: Kept
    """Surviving groups as positions in `before`."""
    units: tuple[Unit, ...]


def select_removal(
    architecture: Architecture, scores: Scores, rules: SelectionRules, target_params: int, max_units: int | None = None
) -> Removal:
    """Take the lowest-scored units, in order, until at most `target_params` parameters remain.

    Stops earlier after `max_units`, or when nothing more may go.
    """
    ranking = Ranking(architecture, scores, rules)
    units: list[Unit] = []
    while ranking.architecture.num_parameters > target_params and (max_units is None or len(units) < max_units):
        unit = ranking.pop()
        if unit is None:
            break
        units.append(unit)
    return Removal(architecture, ranking.architecture, ranking.kept, tuple(units))
