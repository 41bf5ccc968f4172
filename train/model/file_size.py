"""Bytes of an exported file, from the architecture alone. Imports no torch.

The rules are llama.cpp's (llama-quant.cpp of llama-cpp-python 0.3.36): matrices take the type asked for, norms and
biases stay fp32, and the LM head (or the tied embedding) of a 4- or 5-bit file is Q6_K, or Q8_0 where its rows are no
multiple of 256. Rows that are no multiple of 32 would become fp16; the exporter pads them instead.
"""

from __future__ import annotations

from .architecture import Architecture
from .tensors import tensor_names, tensor_shape

BITS = {
    "f32": 32.0,
    "f16": 16.0,
    "bf16": 16.0,
    "q8_0": 8.5,
    "q5_1": 6.0,
    "q5_0": 5.5,
    "q4_1": 5.0,
    "q4_0": 4.5,
    "iq4_nl": 4.5,
}
"""Bits per weight of the types whose files are one type throughout (K-quants mix types per layer)."""

Q6_K_BITS = 6.5625
TENSOR_ALIGNMENT = 32


def gguf_bytes(architecture: Architecture, quantize: str, vocabulary_bytes: int) -> int:
    """Bytes of the GGUF of `architecture` in type `quantize`, its widths padded to 32 as the exporter does.

    `vocabulary_bytes`: see tokenizer_bytes.
    """
    multiple = 1 if BITS[quantize] >= 16 else 32
    output = "model.embed_tokens.weight" if architecture.tie_word_embeddings else "lm_head.weight"
    total = vocabulary_bytes
    for name in tensor_names(architecture):
        shape = tensor_shape(architecture, name)
        if len(shape) == 1:
            total += _aligned(4 * shape[0])
            continue
        rows, columns = (-(-size // multiple) * multiple for size in shape)
        if "embed_tokens" in name or "lm_head" in name:
            rows = shape[0]
        bits = BITS[quantize]
        if name == output and bits < 8:
            bits = Q6_K_BITS if columns % 256 == 0 else BITS["q8_0"]
        total += _aligned(round(rows * columns * bits / 8))
    return total


def _aligned(size: int) -> int:
    return -(-size // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT


def tokenizer_bytes(vocabulary: list[str], merges: list[str]) -> int:
    """Bytes of a vocabulary in GGUF: length-prefixed strings and one 32-bit type per token."""
    strings = sum(8 + len(text.encode("utf-8")) for text in (*vocabulary, *merges))
    return strings + 4 * len(vocabulary)
