"""Bytes of an exported file, from the architecture alone: see file_types. Imports no torch."""

from __future__ import annotations

import json
import math
from typing import Any

from .architecture import Architecture
from .file_types import BODY, TENSOR_BLOCKS, file_types, padded_architecture, row_multiple
from .tensors import tensor_shape

TENSOR_ALIGNMENT = 32


def gguf_bytes(
    architecture: Architecture,
    quantize: str,
    vocabulary: int,
    output_type: str = "",
    embedding_type: str = "",
) -> int:
    """Bytes of the GGUF of `architecture` in type `quantize` (a key of file_types.BODY).

    `vocabulary`: bytes of the tokenizer in the file; `output_type`, `embedding_type`: as the exporter's flags.
    """
    padded = padded_architecture(architecture, row_multiple(quantize))
    total = vocabulary
    for name, kind in file_types(architecture, quantize, output_type, embedding_type).items():
        weights, size = TENSOR_BLOCKS[kind]
        total += _aligned(math.prod(tensor_shape(padded, name)) // weights * size)
    return total


def has_known_size(quantize: str) -> bool:
    """Whether `gguf_bytes` knows a type."""
    return quantize in BODY


def _aligned(size: int) -> int:
    return -(-size // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT


def tokenizer_bytes(tokenizer: Any) -> int:
    """Bytes of a transformers tokenizer's vocabulary in an exported file."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])
    texts = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return vocabulary_bytes(list(tokenizer.get_vocab()), texts)


def vocabulary_bytes(vocabulary: list[str], merges: list[str]) -> int:
    """Bytes of a vocabulary in GGUF: length-prefixed strings and one 32-bit type per token."""
    strings = sum(8 + len(text.encode("utf-8")) for text in (*vocabulary, *merges))
    return strings + 4 * len(vocabulary)
