"""Types and sizes of the tensors in a GGUF, from the architecture alone.

The rules are those of llama-quant.cpp in llama-cpp-python 0.3.36. A file type is the type of most matrices. Some
matrices get more bits, the LM head (or the tied embedding) is Q6_K, norms and biases stay fp32. Rows that are not whole
blocks fall back to another type. Widths are padded to whole blocks of 32 (64) first, as in the exporter. The module
also maps families to llama.cpp architectures with per-layer widths, and pre-tokenizers to llama.cpp's names. Imports no
torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from ...runtime.base.errors import ModelError
from ...runtime.base.ggml_types import TENSOR_TYPES, WRITTEN_TYPES, body_type
from ...runtime.base.quantities import round_up
from .architecture import Architecture, LayerShape
from .tensors import tensor_names, tensor_shape

SIZED = [name for name in TENSOR_TYPES if name not in ("iq4_xs", "q2_0")]
"""Types of tensors whose rules `file_types` follows."""

FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""Type of a tensor whose rows are not whole blocks; f16 if its fallback does not fit either."""

BODY = {name: body_type(name) for name in WRITTEN_TYPES if body_type(name) in SIZED}
"""File type -> type of most of its matrices."""

HEAD = "q6_k"
"""Type of the LM head in files of fewer bits."""


@dataclass(frozen=True)
class _Place:
    """Position of a tensor among the tensors of its kind."""

    index: int
    count: int

    @property
    def wants_more_bits(self) -> bool:
        """Tell whether llama.cpp's use_more_bits selects it: the first and last eighth, and every third between."""
        first, last = self.count // 8, 7 * self.count // 8
        return self.index < first or self.index >= last or (self.index - first) % 3 == 2


def depends_on_place(file_type: str) -> bool:
    """Tell whether a layer's types depend on its position or on earlier layers."""
    return BODY[file_type].endswith("_k") or file_type == "iq4_nl"


def bits_of(kind: str) -> float:
    """Return the bits per weight of a tensor type."""
    _, weights, size = TENSOR_TYPES[kind]
    return 8 * size / weights


def row_multiple(file_type: str) -> int:
    """Return the multiple that the exporter pads widths to."""
    block = TENSOR_TYPES[BODY[file_type]].weights if file_type in BODY else 32
    # K-quants need 256 and fall back to blocks of 32, which is smaller than padding 576 to 768
    return 32 if block > 64 else block


def fitting(kind: str, columns: int) -> str:
    """Return the type of a tensor with rows of `columns` if `kind` is requested."""
    for candidate in (kind, FALLBACKS.get(kind, kind)):
        if columns % TENSOR_TYPES[candidate].weights == 0:
            return candidate
    return "f16"


BLOCK = 32
"""Weights in a block of Q8_0, Q4_0 and similar types."""

LEAST_ROW = 64
"""Weights in the shortest row with whole blocks in our GGUF files. On a CPU with AMX, llama.cpp multiplies 32 tokens by
rows of one block of Q8_0, Q4_0 or Q4_1 wrongly: it adds the product to uninitialised memory (tinygemm_kernel_amx of
ggml-cpu/amx/mmq.cpp, llama-cpp-python 0.3.36). Longer rows are right, and so are rows of one block of a K type."""


def padded_architecture(architecture: Architecture, multiple: int) -> Architecture:
    """Return the shape that the GGUF exporter pads `architecture` to.

    Hidden and FFN widths become multiples of `multiple`. Rows of one block of 32 become rows of LEAST_ROW.
    """
    layers = tuple(_padded_layer(architecture, layer, multiple) for layer in architecture.layers)
    return replace(architecture, hidden_size=_padded_row(architecture.hidden_size, multiple), layers=layers)


def _padded_row(width: int, multiple: int) -> int:
    rounded = round_up(width, multiple)
    # in files of every type, since llama.cpp may quantise an f16 file later
    return LEAST_ROW if rounded == BLOCK else rounded


def _padded_layer(architecture: Architecture, layer: LayerShape, multiple: int) -> LayerShape:
    """Return the layer with its FFN width padded, and with twice the heads where they fill one block."""
    heads, groups = layer.num_attention_heads, layer.num_key_value_heads
    if heads * architecture.head_dim == BLOCK:
        heads *= 2
        # elsewhere the added query heads share the key/value heads that there are
        if not architecture.parts.has_groups:
            groups *= 2
    return LayerShape(heads, groups, _padded_row(layer.intermediate_size, multiple))


def file_types(
    architecture: Architecture, file_type: str, output_type: str = "", embedding_type: str = ""
) -> dict[str, str]:
    """Return {tensor: type} of a GGUF in `file_type` without an importance matrix.

    `output_type` and `embedding_type` are the exporter's flags. Raises KeyError for a file type outside BODY.
    """
    names = tensor_names(architecture)
    places: dict[str, _Place] = {}
    for suffix in ("self_attn.v_proj.weight", "mlp.down_proj.weight"):
        of_kind = [name for name in names if name.endswith(suffix)]
        places |= {name: _Place(index, len(of_kind)) for index, name in enumerate(of_kind)}
    padded = padded_architecture(architecture, row_multiple(file_type))
    types = {}
    for name in names:
        shape = tensor_shape(padded, name)
        if len(shape) == 1:
            types[name] = "f32"
            continue
        wanted = _wanted(padded, name, file_type, places, (output_type, embedding_type))
        types[name] = fitting(wanted, shape[-1])
    return types


def _wanted(
    architecture: Architecture, name: str, file_type: str, places: Mapping[str, _Place], asked: tuple[str, str]
) -> str:
    """Return the type of a matrix before its row length is considered."""
    body = BODY[file_type]
    if name == "lm_head.weight" or (architecture.tie_word_embeddings and "embed_tokens" in name):
        return asked[0] or (HEAD if bits_of(body) < 8 else body)
    if "embed_tokens" in name:
        return asked[1] or body
    return _with_more_bits(architecture, name, file_type, places) or body


def _with_more_bits(architecture: Architecture, name: str, file_type: str, places: Mapping[str, _Place]) -> str | None:
    """Return the larger type that a K file gives to a layer's matrix, or None."""
    place = places.get(name)
    if name.endswith("o_proj.weight"):
        return {"q2_k": "q3_k", "q3_k_m": "q4_k"}.get(file_type)
    if place is None:
        return None
    if file_type in ("q4_k_m", "q5_k_m"):
        return "q6_k" if place.wants_more_bits else None
    if name.endswith("v_proj.weight"):
        ratio = architecture.layers[0].queries_per_group  # llama.cpp reads the first layer's for all of them
        if file_type == "iq4_nl":
            return "q5_k" if ratio >= 4 else None
        early = {"q3_k_m": (2, "q5_k"), "q4_k_s": (4, "q5_k")}.get(file_type)
        if early and place.index < early[0]:
            return early[1]
        return {"q2_k": "q4_k" if ratio >= 4 else "q3_k", "q3_k_m": "q4_k"}.get(file_type)
    if file_type in ("q4_k_s", "iq4_nl"):
        return "q5_k" if place.index < place.count // 8 else None
    if file_type == "q3_k_m":
        return "q5_k" if place.index < place.count // 16 else "q4_k"
    return {"q2_k": "q3_k"}.get(file_type)


TENSOR_ALIGNMENT = 32
TENSOR_INFO_BYTES = 66
"""Bytes of a matrix's name, shape and place in the header, with a name such as blk.29.attn_output.weight."""
SETTINGS_BYTES = 2048
"""Bytes in the header for names and settings of the model, at most as seen."""


def gguf_bytes(
    architecture: Architecture, quantize: str, vocabulary: int, output_type: str = "", embedding_type: str = ""
) -> int:
    """Return the bytes of the GGUF of `architecture` in type `quantize` (a key of BODY).

    `vocabulary` is the bytes of the tokenizer in the file. `output_type` and `embedding_type` are the exporter's flags.
    """
    padded = padded_architecture(architecture, row_multiple(quantize))
    total = vocabulary
    for name, kind in file_types(architecture, quantize, output_type, embedding_type).items():
        _, weights, size = TENSOR_TYPES[kind]
        num_bytes = math.prod(tensor_shape(padded, name)) // weights * size
        total += round_up(num_bytes, TENSOR_ALIGNMENT) + TENSOR_INFO_BYTES
    return total


def tokenizer_bytes(tokenizer: Any) -> int:
    """Return the bytes of a transformers tokenizer's vocabulary and chat template in an exported file."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])
    texts = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    template = json.dumps(tokenizer.chat_template or "").encode()  # one text, or several by name
    return vocabulary_bytes(list(tokenizer.get_vocab()), texts) + len(template)


def vocabulary_bytes(vocabulary: list[str], merges: list[str]) -> int:
    """Return the bytes of a vocabulary in GGUF: length-prefixed strings and one 32-bit type per token."""
    strings = sum(8 + len(text.encode("utf-8")) for text in (*vocabulary, *merges))
    return strings + 4 * len(vocabulary)


PER_LAYER_NORMS = {"before_attention", "before_ffn"}
"""Places of the norms in the architectures with per-layer widths."""


def irregular_gguf(architecture: Architecture) -> str:
    """Return llama.cpp's architecture with per-layer widths for a family, or an empty string.

    A LayerNorm without bias can be written as an RMS norm (rescaling.py).
    """
    parts = architecture.parts
    has_other_mathematics = (
        parts.is_parallel,
        parts.has_partial_rotary,
        parts.has_rotary_layers,
        parts.has_window_rope,
        parts.norm.has_bias,
        parts.scales_embedding,
        bool(parts.scale_setting),
        not parts.is_gated,
        parts.activation != "silu",
        parts.qk_norm == "width",
        set(parts.norms) != PER_LAYER_NORMS,
    )
    if any(has_other_mathematics):
        return ""
    if not parts.qk_norm:
        return "deci"
    fits_openelm = architecture.tie_word_embeddings and not (parts.qkv_bias or parts.norm.takes_mean)
    return "openelm" if fits_openelm else ""


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_DIGITS = {"llama-bpe": r"\p{N}{1,3}", "dbrx": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
"""Number patterns of pre-tokenizers that split by one pattern. A word that is a token is merged from its parts with
`dbrx`, and taken whole with `llama-bpe` (`ignore_merges` of tokenizer.json)."""


def build_pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    """Return the pre-tokenizer of the family's tokenizer.json, or None if llama.cpp's `name` is unknown."""
    if name in _DIGITS:
        split = pre_tokenizers.Split(Regex(_WORDS + _DIGITS[name] + _REST), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {"smollm": pre_tokenizers.Sequence([digits, byte_level]), "gpt-2": byte_level}.get(name)


def pre_tokenizer_name(data: dict[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json. Raises ModelError if there is none."""
    names = ("gpt-2", "smollm", "qwen2", "llama-bpe" if data["model"].get("ignore_merges") else "dbrx")
    steps = _splitting(data.get("pre_tokenizer"))
    for name in names:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = build_pre_tokenizer(name)
        if _splitting(json.loads(backend.to_str())["pre_tokenizer"]) == steps:
            return name
    kinds, patterns = "+".join(step["type"] for step in steps), [step["pattern"] for step in steps if "pattern" in step]
    raise ModelError(f"pre-tokenizer {kinds or 'none'} {patterns} has no known name in llama.cpp")


def _splitting(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer without the setting for offsets."""
    steps = steps_of(pre_tokenizer, "pretokenizers")
    return [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps]


def steps_of(value: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer in tokenizer.json. `key` names the list of a Sequence."""
    if not value:
        return []
    return value[key] if value.get("type") == "Sequence" else [value]
