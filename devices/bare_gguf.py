"""What a bare .gguf file says of itself: an artefact of other tools has no manifest. No package is needed to read it.

Numbers of types: ggml.h (ggml_type) and llama.h (llama_ftype).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..runtime.base.gguf_header import READ_ERRORS, read_header

FILE_TYPES = {
    0: "f32",
    1: "f16",
    2: "q4_0",
    3: "q4_1",
    7: "q8_0",
    8: "q5_0",
    9: "q5_1",
    10: "q2_k",
    11: "q3_k_s",
    12: "q3_k_m",
    13: "q3_k_l",
    14: "q4_k_s",
    15: "q4_k_m",
    16: "q5_k_s",
    17: "q5_k_m",
    18: "q6_k",
    21: "q2_k_s",
    25: "iq4_nl",
    30: "iq4_xs",
    32: "bf16",
    41: "q2_0",
}
"""general.file_type -> what llama.cpp's quantiser calls the whole file."""
TENSOR_TYPES = {
    0: "f32",
    1: "f16",
    2: "q4_0",
    3: "q4_1",
    6: "q5_0",
    7: "q5_1",
    8: "q8_0",
    10: "q2_k",
    11: "q3_k",
    12: "q4_k",
    13: "q5_k",
    14: "q6_k",
    20: "iq4_nl",
    23: "iq4_xs",
    30: "bf16",
    42: "q2_0",
}


@dataclass(frozen=True)
class Described:
    """What the table shows of a model file."""

    num_parameters: int = 0
    """0 where the file does not tell."""
    quantization: str = ""
    """"" where the file does not tell."""


def describe_gguf(path: Path) -> Described:
    """Parameters and type by the header, in about a tenth of a second; nothing where it is damaged."""
    try:
        header = read_header(path)
    except READ_ERRORS:
        return Described()
    elements: Counter[int] = Counter()
    for tensor in header.tensors:
        elements[tensor.kind] += tensor.num_elements
    if not elements:
        return Described()
    of_most_weights = TENSOR_TYPES.get(max(elements, key=elements.__getitem__), "")
    return Described(elements.total(), FILE_TYPES.get(header.values.get("general.file_type", -1), of_most_weights))
