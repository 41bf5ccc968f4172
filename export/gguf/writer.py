"""Writing an F32 GGUF of an irregular model that stock llama.cpp loads. Imports no torch.

Architecture `deci` has per-layer head counts and FFN widths (llama.cpp, measured with llama-cpp-python 0.3.36); uniform
models use their own architecture. Two shapes that `deci` cannot hold are written as their exact equivalents: a layer
without FFN as 32 zero channels (`deci` would silently drop the layer's attention), a first layer without attention as
one zero head (it would not load).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.base.disk import require_room
from ...runtime.base.errors import ModelError
from ...runtime.base.extras import extra
from ...train.model.architecture import Architecture, LayerShape
from ...train.model.file_types import LEAST_FFN_WIDTH
from ..checkpoint import Checkpoint
from ..padding import pad_rows, padded_eps, padded_tensors, padding_notes, uniform_architecture
from ..rope import frequency_factors, permute_rope
from .metadata import add_metadata
from .quantize import file_type
from .tokenizer import GgufTokenizer, read_tokenizer

UNIFORM_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp architecture of a uniform model of each family."""

MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS"""


@dataclass(frozen=True)
class GgufPlan:
    """How a checkpoint is laid out in GGUF."""

    name: str
    """llama.cpp architecture."""
    architecture: Architecture
    """Shape in the file, after padding."""
    permutes_rope: bool
    """Whether q and k rows go from half-split to interleaved order (llama.cpp's NORM rope)."""
    fuses_qkv: bool = False
    """Whether q, k and v are one tensor (openelm)."""
    notes: tuple[str, ...] = ()


def plan_layout(checkpoint: Checkpoint, row_multiple: int) -> GgufPlan:
    """Choose llama.cpp architecture and padding.

    `row_multiple` is what quantised rows must divide by (1: no padding). ModelError where no stock llama.cpp
    architecture holds the model.
    """
    original = checkpoint.architecture
    if len(original.layers) > MAX_LAYERS:
        raise ModelError(f"gguf holds at most {MAX_LAYERS} layers; the model has {len(original.layers)}")
    padded = pad_rows(original, row_multiple)
    if row_multiple > 1:
        padded = _with_two_blocks(padded)
    notes = padding_notes(original, padded)
    has_gaps = any(not (layer.num_attention_heads and layer.intermediate_size) for layer in original.layers)
    name = UNIFORM_ARCHITECTURES[original.family]
    if padded.is_uniform and not has_gaps and (name != "qwen2" or _heads_fill_hidden(padded)):
        return GgufPlan(name, padded, permutes_rope=name == "llama", notes=notes)
    if original.qk_norm:
        if original.tie_word_embeddings:
            filled = _fill_gaps(padded, attention_everywhere=True)
            return GgufPlan("openelm", filled, permutes_rope=False, fuses_qkv=True, notes=notes)
        uniform = uniform_architecture(padded)
        note = "no stock llama.cpp architecture holds irregular q/k-norm layers with an untied head: padded to uniform"
        return GgufPlan(UNIFORM_ARCHITECTURES[original.family], uniform, permutes_rope=False, notes=(*notes, note))
    return GgufPlan("deci", _fill_gaps(padded, attention_everywhere=False), permutes_rope=True, notes=notes)


def _with_two_blocks(architecture: Architecture) -> Architecture:
    """FFN widths of one block padded to two: with AMX, llama.cpp's products of Q8_0 and Q4_0 rows of 32 are wrong
    (llama-cpp-python 0.3.36; a KL of 0.4 where rows of 64 have 0.0001)."""
    layers = tuple(
        replace(layer, intermediate_size=max(layer.intermediate_size, LEAST_FFN_WIDTH))
        if layer.intermediate_size
        else layer
        for layer in architecture.layers
    )
    return replace(architecture, layers=layers)


def _heads_fill_hidden(architecture: Architecture) -> bool:
    """Whether query heads times head_dim is the hidden size, which llama.cpp's qwen2 assumes."""
    return architecture.layers[0].num_attention_heads * architecture.head_dim == architecture.hidden_size


def _fill_gaps(architecture: Architecture, attention_everywhere: bool) -> Architecture:
    """Give zero channels (heads) to layers whose missing FFN (attention) the file format cannot express."""
    layers = []
    for index, layer in enumerate(architecture.layers):
        width = layer.intermediate_size or 32
        needs_head = not layer.num_attention_heads and (attention_everywhere or index == 0)
        layers.append(LayerShape(1, 1, width) if needs_head else replace(layer, intermediate_size=width))
    return replace(architecture, layers=tuple(layers))


def write_gguf(checkpoint: Checkpoint, plan: GgufPlan, path: Path) -> None:
    """Write every tensor in F32."""
    with extra("gguf"):
        import gguf
    writer = gguf.GGUFWriter(path, plan.name)
    _add_fields(writer, checkpoint, plan)
    _add_tokenizer(writer, read_tokenizer(checkpoint))
    num_bytes = 0
    for name, array in _tensors(checkpoint, plan):
        writer.add_tensor(name, np.ascontiguousarray(array))
        num_bytes += array.nbytes
    require_room(path, num_bytes)
    factors = frequency_factors(checkpoint.rope, plan.architecture.head_dim)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(checkpoint: Checkpoint, plan: GgufPlan) -> Iterator[tuple[str, np.ndarray]]:
    """(llama.cpp's name, fp32 array) of every tensor as the plan lays it out."""
    waiting: list[np.ndarray] = []
    for name, array in padded_tensors(checkpoint, plan.architecture):
        if plan.permutes_rope:
            array = _permuted(name, array, plan.architecture)
        if plan.fuses_qkv and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            # tensors come in file order: q, k and v of one layer after each other, as llama.cpp splits the rows
            waiting.append(array)
            if name.endswith("v_proj.weight"):
                yield gguf_name(name).replace("attn_v.", "attn_qkv."), np.concatenate(waiting)
                waiting = []
        else:
            yield gguf_name(name), array


@cache
def _name_map() -> Any:
    """gguf's names of qwen3, the one architecture that has all our tensors; the others call them the same."""
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, MAX_LAYERS)


def gguf_name(name: str) -> str:
    """'model.layers.3.mlp.up_proj.weight' -> 'blk.3.ffn_up.weight'."""
    return _name_map().get_name(name, try_suffixes=(".weight", ".bias"))


def _permuted(name: str, array: np.ndarray, architecture: Architecture) -> np.ndarray:
    """`array` with the rows of q and k (and of their biases) permuted, head by head."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return array
    layer = architecture.layers[int(name.split(".")[2])]
    return permute_rope(array, layer.num_attention_heads if ".q_proj." in name else layer.num_key_value_heads)


def _add_fields(writer: Any, checkpoint: Checkpoint, plan: GgufPlan) -> None:
    architecture, layers = plan.architecture, plan.architecture.layers
    add_metadata(writer, checkpoint)
    writer.add_file_type(file_type("f32"))
    writer.add_block_count(len(layers))
    writer.add_context_length(checkpoint.context_length)
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_vocab_size(architecture.vocab_size)
    if plan.name in ("deci", "openelm"):
        writer.add_head_count([layer.num_attention_heads for layer in layers])
        writer.add_head_count_kv([layer.num_key_value_heads for layer in layers])
        writer.add_feed_forward_length([layer.intermediate_size for layer in layers])
    else:
        writer.add_head_count(layers[0].num_attention_heads)
        writer.add_head_count_kv(layers[0].num_key_value_heads)
        writer.add_feed_forward_length(layers[0].intermediate_size)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_rope_dimension_count(architecture.head_dim)
    writer.add_rope_freq_base(float(checkpoint.rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(padded_eps(checkpoint.rms_norm_eps, checkpoint.architecture, architecture))


def _add_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.token_types)
    if tokenizer.merges:
        writer.add_token_merges(tokenizer.merges)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores)
    for value, add in (
        (tokenizer.bos_id, writer.add_bos_token_id),
        (tokenizer.eos_id, writer.add_eos_token_id),
        (tokenizer.unk_id, writer.add_unk_token_id),
        (tokenizer.pad_id, writer.add_pad_token_id),
        (tokenizer.eot_id, writer.add_eot_token_id),
    ):
        if value is not None:
            add(value)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_space_prefix(tokenizer.add_space_prefix)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
