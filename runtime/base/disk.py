"""A disk that is full, said in one line whatever the library that met it makes of it."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import DiskFullError
from .quantities import format_bytes

FULL = (errno.ENOSPC, errno.EDQUOT)

LAST_BYTES = 65_536
"""A disk with fewer free is full: torch, numpy and llama.cpp write until nothing fits and then say something else."""


def free_bytes(path: Path) -> int:
    """What the disk still holds on which `path` lies or will lie."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def require_room(path: Path, needed: int) -> None:
    """DiskFullError where the disk of `path` has fewer than `needed` bytes free.

    Before writes whose failure says no more: safetensors and numpy reserve the whole file first, and take it back.
    """
    free = free_bytes(path)
    if free < needed:
        raise DiskFullError(path, f"it takes {format_bytes(needed)}, {format_bytes(free)} are free")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes `path`: DiskFullError, of this path, where it fails for a full disk."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except DiskFullError as error:  # of a part of it, which may have another name by then
        raise DiskFullError(path, error.reason) from error
    except BaseException as error:  # torch's CheckpointException is no Exception
        free = free_bytes(path)
        if free >= LAST_BYTES and not _tells_of_full_disk(error):
            raise
        raise DiskFullError(path, f"{format_bytes(free)} are free") from error


def _tells_of_full_disk(error: BaseException | None) -> bool:
    """Whether it, or what led to it, is the system's own word."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
