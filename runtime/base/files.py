"""Files that are whole or absent: write beside, sync, rename.

A disk that is full, said in one line whatever the library that met it makes of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

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


def write_text_atomically(path: Path, text: str) -> None:
    """`write_bytes_atomically` of UTF-8."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """As `written_atomically`."""
    with written_atomically(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Write beside `path`, fsync, rename: after a power cut there is the old file or the new one. A link stays one: the
    file that it names is replaced.

    Raises DiskFullError or OSError; where that or the block fails, nothing is left behind.
    """
    place = path.resolve()
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_left_beside(path: Path) -> None:
    """Remove what `written_atomically` of `path` left in processes that were killed; nobody else writes it now."""
    place = path.resolve()
    left = re.compile(re.escape(f".{place.name}.") + r"\d+\.tmp")
    for beside in place.parent.iterdir():
        if left.fullmatch(beside.name) and beside.is_file():
            beside.unlink()


def write_json_atomically(path: Path, value: Any) -> None:
    """`json_text` of `value`, as `write_text_atomically` writes it."""
    write_text_atomically(path, json_text(value) + "\n")


def json_text(value: Any, depth: int = 0) -> str:
    """Objects are indented, lists stay on one line: widths per layer are read side by side."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    indent = "  " * (depth + 1)
    items = [f"{indent}{json.dumps(str(key))}: {json_text(item, depth + 1)}" for key, item in value.items()]
    return "{\n" + ",\n".join(items) + "\n" + "  " * depth + "}"


@contextlib.contextmanager
def folder_written_atomically(
    path: Path, is_main: bool = True, barrier: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield a temporary sibling folder that takes the place of `path` only if the block succeeds.

    Where several processes write into it, only the main one makes and renames it; `barrier` waits for all. A link stays
    one: the folder that it names is replaced. DiskFullError where the block fails for that.
    """
    place = path.resolve()
    temporary, replaced = (place.with_name(f".{place.name}.efficientllm-{what}") for what in ("new", "old"))
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    try:
        with writing(path):
            yield temporary
            barrier()
            if is_main:
                _sync_tree(temporary)
                _put_in_place(temporary, place, replaced)
            barrier()
    except BaseException:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put_in_place(new: Path, path: Path, replaced: Path) -> None:
    """Renames only, until the new folder is there: what cannot be renamed (a mount point) is not emptied either."""
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    try:
        new.rename(path)
    except OSError:
        if replaced.exists():
            replaced.rename(path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for entry in [folder, *folder.rglob("*")]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file; about 1.5 s per GB."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
