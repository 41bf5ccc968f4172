"""Which axis of which tensor carries what: the one table that saliency, surgery, padding and export read.

An axis is one of
    "hidden"  the transformer stem [hidden_size]
    "query"   query heads of a layer [num_attention_heads * head_dim]
    "kv"      key/value heads of a layer [num_key_value_heads * head_dim]
    "ffn"     FFN channels of a layer [intermediate_size]
    "vocab"   tokens, "head" one head's channels: never pruned
All supported families share these names; biases and q/k norms exist only in some. Imports no torch.
"""

from __future__ import annotations

import re

from .architecture import Architecture

MODEL_TENSORS: dict[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("vocab", "hidden"),
    "model.norm.weight": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}

LAYER_TENSORS: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.k_proj.weight": ("kv", "hidden"),
    "self_attn.v_proj.weight": ("kv", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "query"),
    "self_attn.q_proj.bias": ("query",),
    "self_attn.k_proj.bias": ("kv",),
    "self_attn.v_proj.bias": ("kv",),
    "self_attn.q_norm.weight": ("head",),
    "self_attn.k_norm.weight": ("head",),
    "post_attention_layernorm.weight": ("hidden",),
    "mlp.gate_proj.weight": ("ffn", "hidden"),
    "mlp.up_proj.weight": ("ffn", "hidden"),
    "mlp.down_proj.weight": ("hidden", "ffn"),
}

STEM_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")
"""Suffixes of the RMSNorm gains over the hidden axis."""

SAME_INPUT = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""Matrix whose input is observed -> matrices of its layer that read that input, itself included."""

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


def axes_of(name: str) -> tuple[int | None, tuple[str, ...]]:
    """(layer index or None, axis names) of a parameter; KeyError for a tensor outside the table."""
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return None, MODEL_TENSORS[name]
    return int(match.group(1)), LAYER_TENSORS[match.group(2)]


def is_of_attention(suffix: str) -> bool:
    """Whether a layer's tensor, as "self_attn.q_proj.weight", belongs to its attention block; else to its FFN."""
    return suffix.startswith(("self_attn.", "input_layernorm."))


def input_axis(matrix: str) -> str:
    """Axis of the input of a layer's matrix, as "mlp.down_proj"."""
    return LAYER_TENSORS[f"{matrix}.weight"][1]


def axis_size(architecture: Architecture, layer: int | None, axis: str) -> int:
    """Length of an axis in `architecture`."""
    if axis == "hidden":
        return architecture.hidden_size
    if axis == "vocab":
        return architecture.vocab_size
    if axis == "head":
        return architecture.head_dim
    assert layer is not None
    shape = architecture.layers[layer]
    return {
        "query": shape.num_attention_heads * architecture.head_dim,
        "kv": shape.num_key_value_heads * architecture.head_dim,
        "ffn": shape.intermediate_size,
    }[axis]


def tensor_names(architecture: Architecture) -> list[str]:
    """Names of every stored tensor of a model of this shape, in file order."""
    names = ["model.embed_tokens.weight"]
    for index, shape in enumerate(architecture.layers):
        for suffix in LAYER_TENSORS:
            width = shape.num_attention_heads if is_of_attention(suffix) else shape.intermediate_size
            if width == 0:
                continue
            if suffix.endswith(".bias") and not architecture.qkv_bias:
                continue
            if suffix.endswith(("q_norm.weight", "k_norm.weight")) and not architecture.qk_norm:
                continue
            names.append(f"model.layers.{index}.{suffix}")
    names.append("model.norm.weight")
    if not architecture.tie_word_embeddings:
        names.append("lm_head.weight")
    return names


def tensor_shape(architecture: Architecture, name: str) -> tuple[int, ...]:
    """Shape of a stored tensor; KeyError for a name outside the table."""
    layer, axes = axes_of(name)
    return tuple(axis_size(architecture, layer, axis) for axis in axes)
