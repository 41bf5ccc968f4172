"""How far two runs removed the same groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from efficientllm.train.model.architecture import Architecture
from efficientllm.train.model.groups import KINDS, counts

Survivors = Mapping[str, Sequence[Sequence[int]]]
"""{kind: [positions of the source that survive in layer 0, ...]}, as in a run's architecture.json."""


def removed(survivors: Survivors, source: Architecture) -> set[tuple[str, int, int]]:
    """(kind, layer, position) of every group that is gone; key/value groups are counted by their query heads."""
    return {
        (name, layer, position)
        for name in KINDS
        if name != "kv_group" and name in survivors  # a vocabulary that is all there is left out
        for layer, (size, kept) in enumerate(zip(counts(name, source), survivors[name], strict=True))
        for position in set(range(size)).difference(kept)
    }


def jaccard_of_removed(one: Survivors, other: Survivors, source: Architecture) -> float:
    """Return |A and B| / |A or B| of the groups that two runs removed; 1 if neither removed any."""
    first, second = removed(one, source), removed(other, source)
    union = first | second
    return len(first & second) / len(union) if union else 1.0
