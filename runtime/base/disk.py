"""A disk that is full, said in one line whatever the library that met it makes of it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import DiskFullError
from .quantities import format_bytes

try:
    import resource
except ImportError:  # Windows
    resource = None

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

REASONS = {
    errno.EDQUOT: "the quota of its owner is used up",
    errno.EFBIG: "files may not be as large here (ulimit -f, or the file system's limit)",
}
"""What is in the way although the disk has room."""

LAST_BYTES = 65_536
"""A disk with fewer free is full: torch, numpy and llama.cpp write until nothing fits and then say something else."""


def free_bytes(path: Path) -> int:
    """What the disk still holds on which `path` lies or will lie; boundless where nothing is kept (/proc)."""
    usage = shutil.disk_usage(_existing(path))
    return usage.free if usage.total else sys.maxsize


def _existing(path: Path) -> Path:
    """The folder in which `path` lies or will lie, as far as there is one."""
    return next(place for place in (path, *path.absolute().parents) if place.is_dir())


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
        reason = _full_because(path, error)
        if not reason:
            raise
        raise DiskFullError(path, reason) from error


def _full_because(path: Path, error: BaseException) -> str:
    """Why what failed with `error` failed for a full disk or a quota; "" where it did not."""
    free = free_bytes(path)
    if free < LAST_BYTES:
        return f"{format_bytes(free)} are free"
    code = _full_disk_error(error) or _refusal(path) or _limit(error)
    if code in REASONS:
        return REASONS[code]
    return f"{format_bytes(free)} are free" if code else ""


def _full_disk_error(error: BaseException | None) -> int:
    """The system's own word for it, in an error or in what led to it; 0 where it said nothing of the kind."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return int(error.errno)
        error = error.__cause__ or error.__context__
    return 0


def _limit(error: BaseException) -> int:
    """A limit of files' sizes, which numpy met: it says how much it wrote, and not why no more."""
    says_nothing = isinstance(error, OSError) and error.errno is None
    is_limited = resource is not None and resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return errno.EFBIG if says_nothing and is_limited else 0


def _refusal(path: Path) -> int:
    """The same, by writing LAST_BYTES beside `path`: torch's writer does not say that a quota ended it."""
    try:
        with tempfile.TemporaryFile(dir=_existing(path)) as stream:
            stream.write(bytes(LAST_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return _full_disk_error(error)
    return 0
