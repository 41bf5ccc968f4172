"""Map each tensor dimension to its axis. Saliency, surgery, padding and export read this table.

The axes are "hidden" (the stem, [hidden_size]), "query" (query heads of a layer, [num_attention_heads * head_dim]),
"kv" (key/value heads of a layer, [num_key_value_heads * head_dim]), "ffn" (FFN channels of a layer,
[intermediate_size]), "vocab" (tokens) and "head" (one head's channels, never pruned). Matrices have the same names in
every family. The family's description says which matrices, norms and biases exist. Stock names are translated for torch
and numpy tensors alike. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from .architecture import Architecture, LayerShape
from .families import FAMILIES, Family, Place

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm"
BUFFERS = re.compile(r"rotary_emb\.(cos|sin)_cached|\.attention\.(masked_)?bias$|position_ids$")
"""Names of stored buffers that the config determines. A rotary table also tells head_dim."""

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


@cache
def _model_tensors(family: str) -> dict[str, tuple[str, ...]]:
    """Return {name: axes} of the tensors outside the layers, with the head if it is untied."""
    norms = {f"{FINAL_NORM}.{part}": ("hidden",) for part in FAMILIES[family].norm.tensors}
    return {EMBEDDING: ("vocab", "hidden"), **norms, HEAD: ("vocab", "hidden")}


@cache
def layer_tensors(family: str) -> dict[str, tuple[str, ...]]:
    """Return {name within a layer: axes} in file order: attention with its norms, then the FFN with its norms."""
    parts = FAMILIES[family]
    return {
        **_norm_tensors(parts, "before_attention"),
        **_attention_tensors(parts),
        **_norm_tensors(parts, "after_attention"),
        **_norm_tensors(parts, "before_ffn"),
        **_ffn_tensors(parts),
        **_norm_tensors(parts, "after_ffn"),
    }


def _norm_tensors(parts: Family, place: Place) -> dict[str, tuple[str, ...]]:
    name = parts.norms.get(place)
    return {f"{name}.{part}": ("hidden",) for part in parts.norm.tensors} if name else {}


def _attention_tensors(parts: Family) -> dict[str, tuple[str, ...]]:
    inputs = {"q": "query", "k": "kv", "v": "kv"}
    found: dict[str, tuple[str, ...]] = {f"{part}_proj.weight": (axis, "hidden") for part, axis in inputs.items()}
    found["o_proj.weight"] = ("hidden", "query")
    if parts.qkv_bias:
        found |= {f"{part}_proj.bias": (axis,) for part, axis in inputs.items()}
    if parts.output_bias:
        found["o_proj.bias"] = ("hidden",)
    if parts.qk_norm:
        found |= {f"{part}_norm.weight": ("head" if parts.qk_norm == "head" else inputs[part],) for part in "qk"}
    return {f"self_attn.{name}": axes for name, axes in found.items()}


def _ffn_tensors(parts: Family) -> dict[str, tuple[str, ...]]:
    wide = ("gate_proj", "up_proj") if parts.is_gated else ("up_proj",)
    found: dict[str, tuple[str, ...]] = {f"{name}.weight": ("ffn", "hidden") for name in wide}
    found["down_proj.weight"] = ("hidden", "ffn")
    if parts.ffn_bias:
        found |= {f"{name}.bias": ("ffn",) for name in wide} | {"down_proj.bias": ("hidden",)}
    return {f"mlp.{name}": axes for name, axes in found.items()}


def same_input(parts: Family) -> dict[str, tuple[str, ...]]:
    """Return {matrix whose input is observed: matrices of its layer with the same input, itself included}."""
    wide = ("mlp.gate_proj", "mlp.up_proj") if parts.is_gated else ("mlp.up_proj",)
    return {
        "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj": ("self_attn.o_proj",),
        wide[0]: wide,
        "mlp.down_proj": ("mlp.down_proj",),
    }


def axes_of(name: str, architecture: Architecture) -> tuple[int | None, tuple[str, ...]]:
    """Return (layer index or None, axis names) of a parameter. Raises KeyError outside the table."""
    layer, suffix = split_name(name)
    table = _model_tensors if layer is None else layer_tensors
    return layer, table(architecture.family)[suffix]


def split_name(name: str) -> tuple[int | None, str]:
    """Return (layer index, name within the layer), or (None, name) outside the layers."""
    match = _LAYER_NAME.fullmatch(name)
    return (None, name) if match is None else (int(match.group(1)), match.group(2))


def is_of_attention(suffix: str, parts: Family) -> bool:
    """Tell whether a layer's tensor, such as "self_attn.q_proj.weight", belongs to its attention; else to its FFN."""
    return suffix.startswith(("self_attn.", *(f"{name}." for name in block_norms(parts, "attention"))))


def block_norms(parts: Family, half: str) -> tuple[str, ...]:
    """Return the names of the norms around a layer's attention or FFN (`half`: attention, ffn)."""
    return tuple(name for place, name in parts.norms.items() if place.endswith(half))


def is_stem_norm(name: str, architecture: Architecture) -> bool:
    """Tell whether a tensor is part of a norm over the hidden axis."""
    return split_name(name)[1].rpartition(".")[0] in (FINAL_NORM, *architecture.parts.norms.values())


def stem_norms(architecture: Architecture) -> list[str]:
    """Return the modules of the norms over the hidden axis, the final one last."""
    found = []
    for index, layer in enumerate(architecture.layers):
        halves = {"attention": layer.num_attention_heads, "ffn": layer.intermediate_size}
        for half, width in halves.items():
            if width:
                found += [f"model.layers.{index}.{name}" for name in block_norms(architecture.parts, half)]
    return [*found, FINAL_NORM]


def input_axis(matrix: str) -> str:
    """Return the input axis of a layer's matrix, such as "mlp.down_proj"."""
    # any family with a gate will do: a matrix has the same axes in all families
    return layer_tensors("llama")[f"{matrix}.weight"][1]


def axis_size(architecture: Architecture, layer: int | None, axis: str) -> int:
    """Return the length of an axis in `architecture`."""
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
    """Return the names of all stored tensors of this shape in file order."""
    outside = list(_model_tensors(architecture.family))
    names = [EMBEDDING]
    for index, shape in enumerate(architecture.layers):
        for suffix in layer_tensors(architecture.family):
            in_attention = is_of_attention(suffix, architecture.parts)
            width = shape.num_attention_heads if in_attention else shape.intermediate_size
            if width:  # an absent block has no norms either
                names.append(f"model.layers.{index}.{suffix}")
    return names + [name for name in outside[1:] if name != HEAD or not architecture.tie_word_embeddings]


def tensor_shape(architecture: Architecture, name: str) -> tuple[int, ...]:
    """Return the shape of a stored tensor. Raises KeyError outside the table."""
    layer, axes = axes_of(name, architecture)
    return tuple(axis_size(architecture, layer, axis) for axis in axes)


_FUSED = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")


@dataclass(frozen=True)
class StockTensor:
    """Location of one of our tensors in a stock checkpoint."""

    name: str
    part: int | None = None
    """0, 1 or 2 for q, k or v of a fused matrix; None for a whole tensor."""

    def take(self, tensor: Any, head_dim: int) -> Any:
        """Return our tensor from the stored one."""
        if self.part is None:
            return tensor
        rows = tensor.reshape(-1, 3, head_dim, *tensor.shape[1:])[:, self.part]
        return rows.reshape(-1, *tensor.shape[1:])


def stock_tensor(architecture: Architecture, name: str) -> StockTensor:
    """Return the stock location of our tensor `name`."""
    names = architecture.parts.stock_names
    if names is None:
        return StockTensor(name)
    layer, suffix = split_name(name)
    prefix = "" if layer is None else f"{names.layers}.{layer}."
    if names.fused and (match := _FUSED.fullmatch(suffix)):
        return StockTensor(f"{prefix}{names.fused}.{match.group(2)}", "qkv".index(match.group(1)))
    module, _, part = suffix.rpartition(".")
    return StockTensor(f"{prefix}{names.renamed.get(module, module)}.{part}")


def locate(architecture: Architecture, name: str, known: Container[str]) -> StockTensor:
    """Return the location of our tensor `name` among the `known` names, some of which may be ours."""
    stock = stock_tensor(architecture, name)
    return StockTensor(name) if stock.name not in known and name in known else stock


def from_stock(state: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return the tensors of a stock checkpoint under our names."""
    found = {name: locate(architecture, name, state) for name in tensor_names(architecture)}
    return {name: each.take(state[each.name], architecture.head_dim) for name, each in found.items()}


def to_stock(
    state: Mapping[str, Any], architecture: Architecture, stack: Callable[[list[Any], int], Any]
) -> dict[str, Any]:
    """Return our tensors under stock names. `stack(parts, dim)` is torch.stack or numpy.stack."""
    found: dict[str, Any] = {}
    fused: dict[str, list[Any]] = {}
    for name, tensor in state.items():
        there = stock_tensor(architecture, name)
        if there.part is None:
            found[there.name] = tensor
            continue
        parts = fused.setdefault(there.name, [])  # q, k and v come in file order
        parts.append(tensor.reshape(-1, architecture.head_dim, *tensor.shape[1:]))
        if len(parts) == 3:
            found[there.name] = stack(fused.pop(there.name), 1).reshape(-1, *tensor.shape[1:])
    return found


@dataclass(frozen=True)
class Packed:
    """A compacted shape and the origins of its layers."""

    architecture: Architecture
    origins: tuple[tuple[int, int], ...]
    """(layer of the attention, layer of the FFN) in the source for every layer; equal if one of them is absent."""

    @property
    def names(self) -> dict[str, str]:
        """Return {tensor of the packed model: the same tensor in the source}."""
        found, parts = {}, self.architecture.parts
        for name in tensor_names(self.architecture):
            layer, rest = split_name(name)
            if layer is None:
                found[name] = name
                continue
            attention, ffn = self.origins[layer]
            origin = attention if is_of_attention(rest, parts) else ffn
            found[name] = f"model.layers.{origin}.{rest}"
        return found


def packed(architecture: Architecture) -> Packed:
    """Return the same blocks in the same order in as few layers as possible.

    A model without blocks keeps one empty layer.
    """
    layers: list[LayerShape] = []
    origins: list[tuple[int, int]] = []
    for index, layer in enumerate(architecture.layers):
        if not layer.num_attention_heads and not layer.intermediate_size:
            continue
        may_join = not layer.num_attention_heads and layers and not layers[-1].intermediate_size
        if may_join and not architecture.parts.is_parallel:
            layers[-1] = replace(layers[-1], intermediate_size=layer.intermediate_size)
            origins[-1] = (origins[-1][0], index)
        else:
            layers.append(layer)
            origins.append((index, index))
    if not layers:
        return Packed(replace(architecture, layers=architecture.layers[:1]), ((0, 0),))
    return Packed(replace(architecture, layers=tuple(layers)), tuple(origins))
