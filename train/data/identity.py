"""Whether a corpus is still what it was: enough of it to notice a change, little enough for any size."""

from __future__ import annotations

import hashlib

from .documents import local_files

READ = 1 << 16
"""Bytes of a file's beginning and of its end that are looked at, beside its size."""


def identity_of(path: str) -> str:
    """Of the files that a corpus is read from, hexadecimal; the same for all that have none here (a hub's)."""
    digest = hashlib.sha256()
    for file in local_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode(errors="surrogateescape"))
        with file.open("rb") as stream:
            digest.update(stream.read(READ))
            stream.seek(max(READ, size - READ))
            digest.update(stream.read())
    return digest.hexdigest()
