"""Split a model file into parts, so that a browser can continue an interrupted download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...runtime.base.files import sha256_of

PART_BYTES = 8 << 20
"""Largest loss of an interrupted download. Hosts of static files accept 25 to 100 MB."""


@dataclass(frozen=True)
class Part:
    """One piece of the file."""

    file: str
    bytes: int
    sha256: str


def split_file(path: Path, folder: Path, part_bytes: int) -> list[Part]:
    """Split `path` into FOLDER/model-000.part and so on, which concatenate to the file."""
    parts = []
    with path.open("rb") as stream:
        while content := stream.read(part_bytes):
            name = f"model-{len(parts):03d}.part"
            (folder / name).write_bytes(content)
            parts.append(Part(name, len(content), sha256_of(folder / name)))
    return parts
