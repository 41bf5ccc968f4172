"""Kinds of parameter groups: tables for configuration, ranking, surgery and plots.

A minimal group (KINDS) is the smallest set of weights that can be removed: positions along one axis of
model/tensors.py. A block (BLOCKS) is all remaining groups of some kinds in a layer. A further kind needs one entry
here, its score in saliency.py and, if other groups are removed with it, a line in selection.py. A new axis is a new
width of the model and needs more (docs/architecture.md). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .architecture import Architecture


@dataclass(frozen=True)
class GroupKind:
    """One kind of group. For a kind of the whole model, the layer is ignored (callers pass 0)."""

    flag: str
    """Value of --prune that selects it; kinds of one flag live in the same tensors."""
    axis: str
    """Axis of model/tensors.py whose positions are its survivors."""
    scored_axes: tuple[str, ...]
    """Axes whose sums of element-wise saliency make its score; empty if it is measured (see rows.py)."""
    count: Callable[[Architecture, int], int]
    """(shape, layer) -> number of groups."""
    shrink: Callable[[Architecture, int, int], Architecture]
    """(shape, layer, n) -> the shape after the removal of n groups."""
    step: Callable[[Architecture, int, int], int]
    """(shape, layer, width multiple) -> number of groups removed at once; the count stays a multiple."""
    least: Callable[[Architecture, int, Architecture], int]
    """(shape, layer, floor) -> number of groups that must stay to keep the floor."""
    title: str
    color: str
    is_whole_model: bool = False
    is_head: bool = False
    """Whether a group is head_dim channels of its axis instead of one."""


def _key_value_groups(shape: Architecture, layer: int) -> int:
    return shape.layers[layer].num_key_value_heads


def _query_heads(shape: Architecture, layer: int) -> int:
    return shape.layers[layer].num_attention_heads


def _ffn_channels(shape: Architecture, layer: int) -> int:
    return shape.layers[layer].intermediate_size


def _stem_channels(shape: Architecture, layer: int) -> int:
    return shape.hidden_size


def _rows(shape: Architecture, layer: int) -> int:
    return shape.vocab_size


def _without_key_value_groups(shape: Architecture, layer: int, count: int) -> Architecture:
    """Return the shape without key/value groups and their query heads."""
    old = shape.layers[layer]
    groups = old.num_key_value_heads - count
    heads = groups * old.queries_per_group
    return shape.with_layer(layer, num_key_value_heads=groups, num_attention_heads=heads)


KINDS: dict[str, GroupKind] = {
    # one key/value head and its query heads
    "kv_group": GroupKind(
        flag="attention",
        axis="kv",
        scored_axes=("kv", "query"),
        count=_key_value_groups,
        shrink=_without_key_value_groups,
        step=lambda shape, layer, multiple: 1,
        least=lambda shape, layer, floor: _key_value_groups(floor, layer),
        title="key/value groups",
        color="#e08a3c",
        is_head=True,
    ),
    # one query head; all key/value groups of a layer lose one at once, since attention kernels want equal groups
    "query_head": GroupKind(
        flag="attention",
        axis="query",
        scored_axes=("query",),
        count=_query_heads,
        shrink=lambda shape, layer, n: shape.with_layer(layer, num_attention_heads=_query_heads(shape, layer) - n),
        step=lambda shape, layer, multiple: _key_value_groups(shape, layer),
        # a floor without attention still leaves one per group: the groups themselves go then
        least=lambda shape, layer, floor: (
            _key_value_groups(shape, layer) * max(1, floor.layers[layer].queries_per_group)
        ),
        title="query heads",
        color="#b5495b",
        is_head=True,
    ),
    # one intermediate channel
    "ffn": GroupKind(
        flag="ffn",
        axis="ffn",
        scored_axes=("ffn",),
        count=_ffn_channels,
        shrink=lambda shape, layer, n: shape.with_layer(layer, intermediate_size=_ffn_channels(shape, layer) - n),
        step=lambda shape, layer, multiple: multiple,
        least=lambda shape, layer, floor: _ffn_channels(floor, layer),
        title="FFN channels",
        color="#2f6db3",
    ),
    # one hidden channel of the whole model
    "stem": GroupKind(
        flag="stem",
        axis="hidden",
        scored_axes=("hidden",),
        count=_stem_channels,
        shrink=lambda shape, layer, n: replace(shape, hidden_size=shape.hidden_size - n),
        step=lambda shape, layer, multiple: multiple,
        least=lambda shape, layer, floor: floor.hidden_size,
        title="stem channels",
        color="#4f9d69",
        is_whole_model=True,
    ),
    # one token: a row of the embedding and of the LM head. GGUF and MatMulNBits quantise along rows, so any number may
    # stay; a multiple keeps the head on the kernels that take several rows at once
    "vocabulary": GroupKind(
        flag="vocabulary",
        axis="vocab",
        scored_axes=(),
        count=_rows,
        shrink=lambda shape, layer, n: replace(shape, vocab_size=shape.vocab_size - n),
        step=lambda shape, layer, multiple: multiple,
        least=lambda shape, layer, floor: floor.vocab_size,
        title="vocabulary rows",
        color="#8a6fb0",
        is_whole_model=True,
    ),
}
"""Kinds by their name in scores, logs and architecture.json."""


@dataclass(frozen=True)
class BlockKind:
    """One kind of whole block of a layer. Its score is measured (see blocks.py)."""

    flags: tuple[str, ...]
    """Values of --prune that select it."""
    takes: tuple[str, ...]
    """Kinds whose groups are all removed with it."""
    title: str
    color: str

    def is_in(self, shape: Architecture, layer: int) -> bool:
        """Tell whether the layer has all parts of the block."""
        return all(KINDS[name].count(shape, layer) for name in self.takes)

    def without(self, shape: Architecture, layer: int) -> Architecture:
        """Return the shape without the block."""
        for name in self.takes:
            shape = KINDS[name].shrink(shape, layer, KINDS[name].count(shape, layer))
        return shape


BLOCKS: dict[str, BlockKind] = {
    # query heads go with their groups
    "attention_block": BlockKind(("blocks",), ("kv_group",), "attention of a layer", "#7a4a1f"),
    "ffn_block": BlockKind(("blocks",), ("ffn",), "FFN of a layer", "#173a63"),
    # both at once: what a layer does together is not the sum of what its halves do alone
    "layer": BlockKind(("blocks", "layers"), ("kv_group", "ffn"), "layers", "#5b5f6b"),
}
"""Blocks by their name in scores and logs."""

PRUNE_TYPES = tuple(
    dict.fromkeys(
        [*(kind.flag for kind in KINDS.values()), *(flag for block in BLOCKS.values() for flag in block.flags)]
    )
)
"""Values of --prune."""

KIND_OF_AXIS = {kind.axis: name for name, kind in KINDS.items()}
"""Axis -> name of the kind whose survivors are its positions."""
assert len(KIND_OF_AXIS) == len(KINDS), "two kinds share an axis"


def counts(name: str, architecture: Architecture) -> list[int]:
    """Return the groups of a kind in every layer; one number for a kind of the whole model."""
    kind = KINDS[name]
    layers = range(1 if kind.is_whole_model else len(architecture.layers))
    return [kind.count(architecture, layer) for layer in layers]
