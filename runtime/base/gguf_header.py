"""Read the header of a .gguf file: its metadata and the shape, type and offset of each tensor.

The format is described in ggml's docs/gguf.md. The gguf package rejects files with tensor types newer than itself.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .quantities import round_up

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value type -> struct format, little-endian."""
STRING, ARRAY = 8, 9

READ_ERRORS = (OSError, ValueError, KeyError, struct.error, OverflowError, RecursionError)
"""Errors that `read_header` raises for a file that is damaged or not GGUF."""


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape, type and offset of a tensor."""

    name: str
    shape: tuple[int, ...]
    """Shape in torch's order, (out, in). The file has the reverse order."""
    kind: int
    """Type as a number of ggml_type."""
    offset: int
    """Position of the first byte in the file."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensor table of a file."""

    values: dict[str, Any]
    """Metadata. An array has the value None."""
    tensors: tuple[TensorInfo, ...]


class _Reader:
    """Reads one value after the other. Raises struct.error at the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        length = self.scalar("Q")
        value = self.data[self.at : self.at + length]
        self.at += length
        return value.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Read a value of type `kind`. An array is skipped and returns None."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item in SCALARS:
            self.at += count * struct.calcsize(f"<{SCALARS[item]}")
            return None
        for _ in range(count):
            self.value(item)
        return None


def read_header(path: Path) -> GgufHeader:
    """Read the header in about 0.1 s. Raises one of READ_ERRORS if the file is damaged or not GGUF."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
        reader = _Reader(data)
        reader.scalar("I")  # version; lengths have 64 bits since version 2
        num_tensors, num_values = reader.scalar("Q"), reader.scalar("Q")
        values = {reader.text(): reader.value(reader.scalar("I")) for _ in range(num_values)}
        found = []
        for _ in range(num_tensors):
            name = reader.text()
            sizes = [reader.scalar("Q") for _ in range(reader.scalar("I"))]
            found.append((name, tuple(reversed(sizes)), reader.scalar("I"), reader.scalar("Q")))
        # offsets count from the first aligned byte after the header, not from the start of the file
        alignment = values.get("general.alignment", 32)
        start = round_up(reader.at, alignment)
        tensors = tuple(TensorInfo(name, shape, kind, start + offset) for name, shape, kind, offset in found)
        return GgufHeader(values, tensors)
