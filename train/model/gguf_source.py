"""Read GGUF files whose layers differ, or whose architecture transformers does not read, as data under our names.

The tables are shared with the exporter, which writes the same architectures (export/gguf). Imports no torch at the top.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runtime.base.errors import ModelError
from ...runtime.base.extras import extra
from ...runtime.base.gguf_header import READ_ERRORS, GgufHeader, read_header
from .families import FAMILIES, Family, Place
from .rotary import frequency_factors, unpermute_rope
from .target_rules import NO_ROPE_EVERY

if TYPE_CHECKING:
    from .stored_tensors import Stored

FAMILY_OF_GGUF = {
    "llama": "llama",
    "deci": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "openelm": "qwen3",
    "gptneox": "gpt_neox",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
}
"""llama.cpp architecture -> the family with the same mathematics, where this module reads it."""
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma3")
"""Architectures that transformers 5.24 reads if all layers are equal and no projection has an unusual bias."""
INTERLEAVED = ("llama", "deci", "olmo", "smollm3")
"""Architectures with NORM rope, which need interleaved rows of q and k."""

PLACES: dict[Place, str] = {
    "before_attention": "attn_norm",
    "after_attention": "post_attention_norm",
    "before_ffn": "ffn_norm",
    "after_ffn": "post_ffw_norm",
}
"""llama.cpp's names of a layer's norms."""
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""llama.cpp's names of all other tensors, equal in all architectures."""
WIDTH_KEYS = {
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Settings of llama3's rope in all releases. The file has only the factors that follow from them."""


def is_foreign_gguf(path: Path) -> bool:
    """Tell whether this module reads a GGUF file. Raises ModelError for an architecture that nothing here reads."""
    header = header_of(path)
    name = header.values.get("general.architecture")
    readable = {*FAMILY_OF_GGUF, *READ_BY_TRANSFORMERS}
    if name not in readable:
        raise ModelError(
            f"{path}: GGUF files of architecture {name!r} cannot be read, only {', '.join(sorted(readable))}; give "
            "the Hugging Face folder that the file was made from"
        )
    if name not in READ_BY_TRANSFORMERS:
        return True
    # the header reader gives None for an array, here one width per layer
    has_widths_of_layers = any(header.values.get(f"{name}.{key}", 0) is None for key in WIDTH_KEYS.values())
    unusual = ["attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"]
    if name != "qwen2":
        unusual += ["attn_q.bias", "attn_k.bias", "attn_v.bias"]
    has_biases = any(tensor.name.endswith(tuple(unusual)) for tensor in header.tensors)
    return name in FAMILY_OF_GGUF and (has_widths_of_layers or has_biases)


def header_of(path: Path) -> GgufHeader:
    """Return the header of a file without its arrays, in a tenth of the time of gguf's reader. Raises ModelError."""
    try:
        return read_header(path)
    except READ_ERRORS as error:
        raise ModelError(f"{path} is damaged: {error}; copy or download it again") from error


def header_settings(path: Path) -> dict[str, Any]:
    """Return the settings of config.json of a file whose layers are equal, without reading its weights.

    Raises ModelError or KeyError where only the weights tell them: a stored head may be the embedding once more.
    """
    header = header_of(path)
    arch, rows = header.values["general.architecture"], {tensor.name: tensor.shape[0] for tensor in header.tensors}
    if "output.weight" in rows:
        raise ModelError(f"{path}: embedding and head must be compared")
    settings = _settings(arch, header.values, FAMILIES[FAMILY_OF_GGUF[arch]])
    return settings | {"tie_word_embeddings": True, "vocab_size": rows["token_embd.weight"]}


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Return (settings of config.json, tensors under our names) of a file. Fused q, k and v stay fused."""
    with extra("train"):
        from gguf import GGUFReader
    reader, values = GGUFReader(path), {}
    for name, field in reader.fields.items():
        if not name.startswith("tokenizer.ggml.t"):  # the tokens and their types: slow to convert, and not needed here
            values[name] = field.contents()
    arch = values["general.architecture"]
    parts = FAMILIES[FAMILY_OF_GGUF[arch]]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _settings(arch, values, parts) | {"tie_word_embeddings": "output.weight" not in tensors}
    factors = tensors.pop("rope_freqs.weight", None)
    if factors is not None:
        config["rope_parameters"] = _llama3(config, np.array(factors.data, np.float64))
    names = _our_modules(parts)
    found = {}
    for name, tensor in tensors.items():
        found[_our_name(name, names)] = _stored(tensor, arch, config["head_dim"])
    return config, found


def _settings(arch: str, values: Mapping[str, Any], parts: Family) -> dict[str, Any]:
    """Return the settings of the family's config.json. Widths are those of the widest layer."""

    def value(key: str, default: Any = None) -> Any:
        found = values.get(f"{arch}.{key}", default)
        if found is None:
            raise ModelError(f"the file lacks {arch}.{key}; is it complete?")
        return found

    def widest(key: str, default: Any = None) -> int:
        found = value(key, default)
        return int(max(found, default=0) if isinstance(found, list) else found)

    heads, layers = widest(WIDTH_KEYS["num_attention_heads"]), value("block_count")
    head_dim = value("attention.key_length", 0)
    if not head_dim and not parts.has_partial_rotary:  # then rotary channels are not all channels of a head
        head_dim = value("rope.dimension_count", 0)
    head_dim = int(head_dim or value("embedding_length") // heads)
    scaling = value("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ModelError(f"rope scaling {scaling!r} of the file is not supported; only linear and llama3 are")
    rope = {"rope_type": "default", "rope_theta": value("rope.freq_base", 10000.0)}
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": value("rope.scaling.factor")}
    if parts.has_partial_rotary:
        rope["partial_rotary_factor"] = value("rope.dimension_count", head_dim) / head_dim
    eps_key = "layer_norm_epsilon" if parts.norm.takes_mean else "layer_norm_rms_epsilon"
    # without a number of key/value heads, each query head has its own
    defaults = {"num_key_value_heads": heads}
    widths = {name: widest(key, defaults.get(name)) for name, key in WIDTH_KEYS.items()}
    config = {
        "model_type": FAMILY_OF_GGUF[arch],
        "hidden_size": value("embedding_length"),
        "num_hidden_layers": layers,
        **widths,
        "head_dim": head_dim,
        "max_position_embeddings": value("context_length"),
        "rope_parameters": rope,
        parts.norm.eps_setting: value(f"attention.{eps_key}", 1e-5),
        parts.activation_setting: parts.activation,
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": values.get("tokenizer.ggml.padding_token_id"),
    }
    if parts.has_rotary_layers:
        config["no_rope_layers"] = [int((index + 1) % NO_ROPE_EVERY > 0) for index in range(layers)]
    if parts.is_parallel:
        config["use_parallel_residual"] = value("use_parallel_residual", False)
    if f"{arch}.attention.clamp_kqv" in values:
        config["clip_qkv"] = value("attention.clamp_kqv")
    return config


def _llama3(config: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Return the rope settings that give these divisors of the frequencies, [head_dim / 2]."""
    # the longest wavelengths are divided by the whole factor, and no other by more
    rope = {**config["rope_parameters"], **LLAMA3, "rope_type": "llama3", "factor": float(factors.max())}
    computed = frequency_factors(rope, config["head_dim"])
    if computed is None or computed.shape != factors.shape or not np.allclose(computed, factors, rtol=1e-3):
        raise ModelError("rope_freqs.weight of the file are not the factors of llama3's rope; no other is supported")
    return rope


def _our_modules(parts: Family) -> dict[str, str]:
    """Return {llama.cpp's name: our module}."""
    norms = {PLACES[place]: norm for place, norm in parts.norms.items()}
    return {theirs: ours for ours, theirs in NAMES.items()} | norms | {"attn_qkv": "self_attn.qkv_proj"}


def _our_name(name: str, modules: Mapping[str, str]) -> str:
    """Return our name of a tensor: 'blk.3.ffn_up.weight' -> 'model.layers.3.mlp.up_proj.weight'."""
    module, _, part = name.rpartition(".")
    if module.startswith("blk.") and module.count(".") == 2:
        _, layer, module = module.split(".")
        return f"model.layers.{layer}.{modules.get(module, module)}.{part}"
    return f"{modules.get(module, module)}.{part}"


def _stored(tensor: Any, arch: str, head_dim: int) -> Stored:
    """Return a tensor of gguf's reader, dequantised on use, with rows of q and k in half-split order."""
    import gguf
    import torch

    from .stored_tensors import Stored

    shape = tuple(int(size) for size in reversed(tensor.shape))  # ggml has the contiguous dimension first
    is_rotated = arch in INTERLEAVED and tensor.name.split(".")[-2] in ("attn_q", "attn_k")

    def read() -> torch.Tensor:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if is_rotated:
            return torch.from_numpy(unpermute_rope(array, shape[0] // head_dim))
        return torch.from_numpy(array.copy())  # an fp32 tensor is a read-only view of the file

    return Stored(shape, read)
