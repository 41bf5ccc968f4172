"""What a bare .gguf file says of itself: an artefact of other tools has no manifest. No package is needed to read it.

The format: ggml's docs/gguf.md; numbers of types: ggml.h (ggml_type) and llama.h (llama_ftype).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> its struct format, little-endian."""
STRING, ARRAY = 8, 9
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
}


@dataclass(frozen=True)
class Described:
    """What the table shows of a model file."""

    num_parameters: int = 0
    """0 where the file does not tell."""
    quantization: str = ""
    """"" where the file does not tell."""


class _Header:
    """Reads one value after the other; struct.error at the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 4

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        length = self.scalar("Q")
        value = self._data[self._at : self._at + length]
        self._at += length
        return value.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """None for an array, which is passed over."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item in SCALARS:
            self._at += count * struct.calcsize(f"<{SCALARS[item]}")
            return None
        for _ in range(count):
            self.value(item)
        return None


def describe_gguf(path: Path) -> Described:
    """Parameters and type by the header, in about a tenth of a second; nothing where it is damaged."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _describe(_Header(data)) if data[:4] == b"GGUF" else Described()
    except (OSError, ValueError, KeyError, struct.error, OverflowError, RecursionError):
        return Described()


def _describe(header: _Header) -> Described:
    header.scalar("I")  # version: since the second, lengths are of 64 bits
    num_tensors, num_values = header.scalar("Q"), header.scalar("Q")
    values = {header.text(): header.value(header.scalar("I")) for _ in range(num_values)}
    elements: Counter[int] = Counter()
    for _ in range(num_tensors):
        header.text()
        size = math.prod(header.scalar("Q") for _ in range(header.scalar("I")))
        elements[header.scalar("I")] += size
        header.scalar("Q")  # where its data begin
    if not elements:
        return Described()
    of_most_weights = TENSOR_TYPES.get(max(elements, key=elements.__getitem__), "")
    return Described(elements.total(), FILE_TYPES.get(values.get("general.file_type", -1), of_most_weights))
