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
    width: str
    """Width of a layer, or of the whole model, that is the number of its groups."""
    scored_axes: tuple[str, ...]
    """Axes whose sums of element-wise saliency make its score; empty if it is measured (see rows.py)."""
    title: str
    color: str
    step: Callable[[Architecture, int, int], int] = lambda shape, layer, multiple: multiple
    """(shape, layer, width multiple) -> number of groups removed at once; the count stays a multiple."""
    is_whole_model: bool = False
    is_head: bool = False
    """Whether a group is head_dim channels of its axis instead of one."""

    def count(self, shape: Architecture, layer: int) -> int:
        """Return the number of groups."""
        return getattr(shape if self.is_whole_model else shape.layers[layer], self.width)

    def shrink(self, shape: Architecture, layer: int, count: int) -> Architecture:
        """Return the shape after the removal of `count` groups."""
        widths = {self.width: self.count(shape, layer) - count}
        if self.is_whole_model:
            return replace(shape, **widths)
        if self.axis == "kv":  # a key/value head takes its query heads along
            widths["num_attention_heads"] = widths[self.width] * shape.layers[layer].queries_per_group
        return shape.with_layer(layer, **widths)

    def least(self, shape: Architecture, layer: int, floor: Architecture) -> int:
        """Return the number of groups that must stay to keep the widths of `floor`."""
        if self.axis != "query":
            return self.count(floor, layer)
        # a floor without attention still leaves one per group: the groups themselves are removed then
        return shape.layers[layer].num_key_value_heads * max(1, floor.layers[layer].queries_per_group)


KINDS: dict[str, GroupKind] = {
    # one key/value head and its query heads
    "kv_group": GroupKind(
        flag="attention",
        axis="kv",
        width="num_key_value_heads",
        scored_axes=("kv", "query"),
        title="key/value groups",
        color="#e08a3c",
        step=lambda shape, layer, multiple: 1,
        is_head=True,
    ),
    # one query head; all key/value groups of a layer lose one at once, since attention kernels want equal groups
    "query_head": GroupKind(
        flag="attention",
        axis="query",
        width="num_attention_heads",
        scored_axes=("query",),
        title="query heads",
        color="#b5495b",
        step=lambda shape, layer, multiple: shape.layers[layer].num_key_value_heads,
        is_head=True,
    ),
    # one intermediate channel
    "ffn": GroupKind(
        flag="ffn", axis="ffn", width="intermediate_size", scored_axes=("ffn",), title="FFN channels", color="#2f6db3"
    ),
    # one hidden channel of the whole model
    "stem": GroupKind(
        flag="stem",
        axis="hidden",
        width="hidden_size",
        scored_axes=("hidden",),
        title="stem channels",
        color="#4f9d69",
        is_whole_model=True,
    ),
    # one token: a row of the embedding and of the LM head. GGUF and MatMulNBits quantise along rows, so any number may
    # stay; a multiple keeps the head on the kernels that take several rows at once
    "vocabulary": GroupKind(
        flag="vocabulary",
        axis="vocab",
        width="vocab_size",
        scored_axes=(),
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

_BLOCK_FLAGS = (flag for block in BLOCKS.values() for flag in block.flags)
PRUNE_TYPES = tuple(dict.fromkeys([*(kind.flag for kind in KINDS.values()), *_BLOCK_FLAGS]))
"""Values of --prune."""

KIND_OF_AXIS = {kind.axis: name for name, kind in KINDS.items()}
"""Axis -> name of the kind whose survivors are its positions."""
assert len(KIND_OF_AXIS) == len(KINDS), "two kinds share an axis"


def counts(name: str, architecture: Architecture) -> list[int]:
    """Return the groups of a kind in every layer; one number for a kind of the whole model."""
    kind = KINDS[name]
    layers = range(1 if kind.is_whole_model else len(architecture.layers))
    return [kind.count(architecture, layer) for layer in layers]
