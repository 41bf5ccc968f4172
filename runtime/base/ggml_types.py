"""Types of GGUF files: of one tensor (ggml.h: ggml_type) and of most tensors of a file (llama.h: llama_ftype)."""

from __future__ import annotations

from typing import NamedTuple


class TensorType(NamedTuple):
    """Type of a tensor, whose rows are whole blocks."""

    number: int
    weights: int
    """Weights in a block."""
    num_bytes: int
    """Bytes of a block."""


TENSOR_TYPES = {
    "f32": TensorType(0, 1, 4),
    "f16": TensorType(1, 1, 2),
    "bf16": TensorType(30, 1, 2),
    "q8_0": TensorType(8, 32, 34),
    "q5_1": TensorType(7, 32, 24),
    "q5_0": TensorType(6, 32, 22),
    "q4_1": TensorType(3, 32, 20),
    "q4_0": TensorType(2, 32, 18),
    "iq4_nl": TensorType(20, 32, 18),
    "q6_k": TensorType(14, 256, 210),
    "q5_k": TensorType(13, 256, 176),
    "q4_k": TensorType(12, 256, 144),
    "q3_k": TensorType(11, 256, 110),
    "q2_k": TensorType(10, 256, 84),
    "iq4_xs": TensorType(23, 256, 136),
    "q2_0": TensorType(42, 64, 18),
}

WRITTEN_TYPES = {
    **{"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q5_1": 9, "q5_0": 8},
    **{"q4_k_m": 15, "q4_k_s": 14, "q4_1": 3, "q4_0": 2, "iq4_nl": 25, "iq4_xs": 30, "q3_k_m": 12, "q2_k": 10},
}
"""File types of the export, as llama.cpp's quantiser calls them."""
FILE_TYPES = {**WRITTEN_TYPES, "q3_k_s": 11, "q3_k_l": 13, "q2_k_s": 21, "q2_0": 41}


def body_type(file_type: str) -> str:
    """Return the type of most matrices of a file: q4_k for q4_k_m."""
    return file_type if file_type in TENSOR_TYPES else file_type.rpartition("_")[0]
