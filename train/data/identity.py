"""Whether a corpus is still what it was: enough of it to notice a change, little enough for any size."""

from __future__ import annotations

import hashlib
from pathlib import Path

READ = 1 << 20
"""Bytes of a file's beginning and of its end that are looked at, beside its size."""


def identity_of(path: str) -> str:
    """Of a file or of all files of a folder, hexadecimal; "" of what is neither (a hub id)."""
    place = Path(path)
    files = sorted(each for each in place.rglob("*") if each.is_file()) if place.is_dir() else [place]
    if not place.exists():
        return ""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(place).as_posix()} {size}\n".encode(errors="surrogateescape"))
        with file.open("rb") as stream:
            digest.update(stream.read(READ))
            stream.seek(max(READ, size - READ))
            digest.update(stream.read())
    return digest.hexdigest()
