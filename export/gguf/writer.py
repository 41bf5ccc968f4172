"""Write an F32 GGUF with its tokenizer that stock llama.cpp loads, in the layout of layout.py. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.base.extras import extra
from ...runtime.base.files import require_room
from ...runtime.base.ggml_types import WRITTEN_TYPES
from ...train.model.architecture import Architecture
from ...train.model.gguf_source import NAMES, PLACES
from ...train.model.rotary import frequency_factors, permute_rope
from ...train.model.target_rules import GGUF_WINDOWS
from ...train.model.tensors import split_name
from ..checkpoint import Checkpoint
from ..padding import padded_tensors
from .layout import PER_LAYER_WIDTHS, GgufPlan
from .tokenizer import add_tokenizer, file_name


def add_metadata(writer: Any, checkpoint: Checkpoint) -> None:
    """Write general.*: type, name, size, and the licence, tags, base model and data sets of the checkpoint's README.md.

    The class is the one that llama.cpp's converter uses.
    """
    import gguf
    import yaml

    parameters = checkpoint.architecture.num_parameters
    try:
        card = gguf.Metadata.load_model_card(checkpoint.folder)
    except (yaml.YAMLError, UnicodeDecodeError):  # anybody's text, and not what the weights depend on
        card = {}
    metadata = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, total_params=parameters)
    name = Path(checkpoint.name).name  # not that of the folder, which may be temporary
    metadata.name = file_name(name, checkpoint.tokenizer_data)
    metadata.size_label = metadata.size_label or gguf.size_label(parameters, 0, 0, 0)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)


QKV = tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias"))


def write_gguf(checkpoint: Checkpoint, plan: GgufPlan, path: Path) -> None:
    """Write every tensor in F32."""
    with extra("gguf"):
        import gguf
    writer = gguf.GGUFWriter(path, plan.name)
    _add_fields(writer, checkpoint, plan)
    add_tokenizer(writer, checkpoint)
    num_bytes = 0
    for name, array in _tensors(checkpoint, plan):
        writer.add_tensor(name, np.ascontiguousarray(array))
        num_bytes += array.nbytes
    require_room(path, num_bytes)
    factors = frequency_factors(checkpoint.rope, _rotary_dim(checkpoint))
    # the factors of linear scaling are equal, and the file has a field for them
    if factors is not None and checkpoint.rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(checkpoint: Checkpoint, plan: GgufPlan) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (llama.cpp's name, fp32 array) of every tensor in the plan's layout."""
    architecture = plan.architecture
    is_centred = checkpoint.architecture.parts.norm.takes_mean and not architecture.parts.norm.takes_mean
    waiting: list[np.ndarray] = []
    for name, array in padded_tensors(checkpoint, architecture, plan.scales, is_centred):
        if plan.permutes_rope:
            array = _permuted(name, array, architecture)
        if name.endswith("q_norm.weight"):  # the scores' scale, which the file cannot store, moves into this gain
            array = array * query_gain(checkpoint, plan)
        if plan.fuses_qkv and name.endswith(QKV):
            # tensors come in file order: q, k and v of one layer after each other, as llama.cpp splits the rows
            waiting.append(array)
            if len(waiting) == 3:
                yield gguf_name(name, plan), np.concatenate(waiting)
                waiting = []
        else:
            yield gguf_name(name, plan), array


def query_gain(checkpoint: Checkpoint, plan: GgufPlan) -> np.float32:
    """Return the factor of q's norm in the file. llama.cpp's gemma3 multiplies scores by head_dim's scale."""
    scale = checkpoint.attention[0].scale * plan.architecture.head_dim**0.5
    return np.float32(scale if plan.name == "gemma3" else 1)


def gguf_name(name: str, plan: GgufPlan) -> str:
    """Return llama.cpp's name: 'model.layers.3.mlp.up_proj.weight' -> 'blk.3.ffn_up.weight'."""
    layer, suffix = split_name(name)
    module, _, part = suffix.rpartition(".")
    if plan.fuses_qkv and suffix.endswith(QKV):
        return f"blk.{layer}.attn_qkv.{part}"
    places = {norm: PLACES[place] for place, norm in plan.architecture.parts.norms.items()}
    found = {**NAMES, **places}[module]
    return f"{found}.{part}" if layer is None else f"blk.{layer}.{found}.{part}"


def _permuted(name: str, array: np.ndarray, architecture: Architecture) -> np.ndarray:
    """Return `array` with the rows of q and k (and of their biases) permuted, head by head."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return array
    layer = architecture.layers[int(name.split(".")[2])]
    return permute_rope(array, layer.num_attention_heads if ".q_proj." in name else layer.num_key_value_heads)


def _add_fields(writer: Any, checkpoint: Checkpoint, plan: GgufPlan) -> None:
    import gguf

    architecture, layers = plan.architecture, plan.architecture.layers
    add_metadata(writer, checkpoint)
    writer.add_file_type(WRITTEN_TYPES["f32"])
    writer.add_block_count(len(layers))
    writer.add_context_length(checkpoint.context_length)
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_vocab_size(architecture.vocab_size)
    # the other architectures read one number for all layers
    if plan.name in PER_LAYER_WIDTHS:
        writer.add_head_count([layer.num_attention_heads for layer in layers])
        writer.add_head_count_kv([layer.num_key_value_heads for layer in layers])
        writer.add_feed_forward_length([layer.intermediate_size for layer in layers])
    else:
        writer.add_head_count(layers[0].num_attention_heads)
        writer.add_head_count_kv(layers[0].num_key_value_heads)
        writer.add_feed_forward_length(layers[0].intermediate_size)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_rope_dimension_count(_rotary_dim(checkpoint))
    writer.add_rope_freq_base(float(checkpoint.rope["rope_theta"]))
    if checkpoint.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(checkpoint.rope["factor"])
    if architecture.parts.norm.takes_mean:
        writer.add_layer_norm_eps(plan.scales.stem_eps)
    else:
        writer.add_layer_norm_rms_eps(plan.scales.stem_eps)
    if architecture.parts.is_parallel:
        writer.add_parallel_residual(True)
    if plan.name in GGUF_WINDOWS:
        windows = [settings.window for settings in checkpoint.attention]
        writer.add_sliding_window(max(windows))
        writer.add_sliding_window_pattern([window > 0 for window in windows])
        local = next((settings.rope for settings in checkpoint.attention if settings.window), None)
        writer.add_rope_freq_base_swa(float((local or checkpoint.rope)["rope_theta"]))


def _rotary_dim(checkpoint: Checkpoint) -> int:
    """Return the rotated channels of a head, in layers with a rotary embedding."""
    return max(settings.rotary_dim for settings in checkpoint.attention)
