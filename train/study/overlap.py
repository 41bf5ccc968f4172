"""How far two runs removed the same groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..model.architecture import Architecture

Survivors = Mapping[str, Sequence[Sequence[int]]]
"""{kind: [positions of the source that survive in layer 0, ...]}, as in a run's architecture.json."""


def removed(survivors: Survivors, source: Architecture) -> set[tuple[str, int, int]]:
    """(kind, layer, position) of every FFN channel, query head and stem channel that is gone."""
    widths = {
        "ffn": [layer.intermediate_size for layer in source.layers],
        "query_head": [layer.num_attention_heads for layer in source.layers],
        "stem": [source.hidden_size],
    }
    gone: set[tuple[str, int, int]] = set()
    for kind, sizes in widths.items():
        for layer, (size, kept) in enumerate(zip(sizes, survivors[kind], strict=True)):
            gone |= {(kind, layer, position) for position in set(range(size)).difference(kept)}
    return gone


def jaccard_of_removed(one: Survivors, other: Survivors, source: Architecture) -> float:
    """|A and B| / |A or B| of what two runs removed; 1 where neither removed anything."""
    first, second = removed(one, source), removed(other, source)
    union = first | second
    return len(first & second) / len(union) if union else 1.0
