"""Write files and folders atomically, and report a full disk in one line.

Every file is written beside its path, synced and renamed. Libraries report a full disk in different ways, so the cause
is found from the error, the free bytes and a test write.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
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
"""Reasons why a write fails although the disk has room."""

LAST_BYTES = 65_536
"""A disk with fewer free bytes counts as full. torch, numpy and llama.cpp fill it and then report other errors."""


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk of `path`, which need not exist. A file system without a size has no limit."""
    usage = shutil.disk_usage(_existing(path))
    return usage.free if usage.total else sys.maxsize


def _existing(path: Path) -> Path:
    """Return the nearest existing folder of `path`."""
    return next(place for place in (path, *path.absolute().parents) if place.is_dir())


def require_room(path: Path, needed: int) -> None:
    """Raise DiskFullError if the disk of `path` has fewer than `needed` bytes free."""
    # safetensors and numpy reserve the whole file and remove it after a failure: the disk shows no cause afterwards
    free = free_bytes(path)
    if free < needed:
        raise DiskFullError(path, f"it takes {format_bytes(needed)}, {format_bytes(free)} are free")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise DiskFullError for `path` if the block fails because the disk is full."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):  # no failed write, whatever room the disk has
        raise
    except DiskFullError as error:  # of a temporary file below `path`
        raise DiskFullError(path, error.reason) from error
    except BaseException as error:  # torch's CheckpointException is not an Exception
        code = full_disk_errno(path, error)
        if not code:
            raise
        raise DiskFullError(path, REASONS.get(code) or f"{format_bytes(free_bytes(path))} are free") from error


def full_disk_errno(path: Path, error: BaseException) -> int:
    """Return the errno of a full disk, a used-up quota or a limit of file sizes if it caused `error`, else 0."""
    if free_bytes(path) < LAST_BYTES:
        return errno.ENOSPC
    return _errno_of(error) or _test_write(path) or _size_limit(error)


def _errno_of(error: BaseException | None) -> int:
    """Return the errno of a full disk in `error` or its causes, 0 if there is none."""
    if isinstance(error, OSError) and error.errno in FULL:
        return int(error.errno)
    # torch's CheckpointException has those of all ranks: by now the main one may have deleted what filled the disk
    failures = [cause for cause, _ in getattr(error, "failures", {}).values()]
    causes = [*failures, error.__cause__ or error.__context__] if error is not None else []
    return next(filter(None, map(_errno_of, causes)), 0)


def _size_limit(error: BaseException) -> int:
    """Return EFBIG if numpy, whose OSError has no errno, reached a limit of file sizes, else 0."""
    if resource is None or not isinstance(error, OSError) or error.errno is not None:
        return 0
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return errno.EFBIG if limit != resource.RLIM_INFINITY else 0


def _test_write(path: Path) -> int:
    """Return the errno of writing LAST_BYTES beside `path`, 0 if that works. torch's writer reports no quota."""
    try:
        with tempfile.TemporaryFile(dir=_existing(path)) as stream:
            stream.write(bytes(LAST_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return _errno_of(error)
    return 0


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with `write_bytes_atomically`."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write `content` with `written_atomically`."""
    with written_atomically(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Yield a stream to a temporary file that replaces `path` after fsync. A link stays, and its target is replaced.

    After a power failure the path holds the old or the new file. If the block fails, the temporary file is removed.
    Raises DiskFullError or OSError.
    """
    place = path.resolve()
    # beside the target: a rename replaces a file at once only within one file system
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


def write_json_atomically(path: Path, value: Any) -> None:
    """Write `json_text(value)` with `write_text_atomically`."""
    write_text_atomically(path, json_text(value) + "\n")


def without_nan(value: Any) -> Any:
    """Return a value of dicts, lists and numbers with None in place of NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def json_text(value: Any, depth: int = 0) -> str:
    """Return JSON with indented objects and each list on one line, so that widths per layer stand side by side."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    indent = "  " * (depth + 1)
    items = [f"{indent}{json.dumps(str(key))}: {json_text(item, depth + 1)}" for key, item in value.items()]
    return "{\n" + ",\n".join(items) + "\n" + "  " * depth + "}"


@contextlib.contextmanager
def folder_written_atomically(
    path: Path, is_main: bool = True, barrier: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield a temporary sibling folder that replaces `path` if the block succeeds.

    A link stays, and its target is replaced. If several processes write into it, only the main one creates and renames
    it, and `barrier` waits for all. Raises DiskFullError if the disk is full.
    """
    place = path.resolve()
    temporary = place.with_name(f".{place.name}.efficientllm-new")
    replaced = place.with_name(f".{place.name}.efficientllm-old")
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()  # no process writes before the folder is there
    try:
        with writing(path):
            yield temporary
            barrier()  # the files of all processes are complete
            if is_main:
                _sync_tree(temporary)
                _put_in_place(temporary, place, replaced)
            barrier()
    except BaseException:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put_in_place(new: Path, path: Path, replaced: Path) -> None:
    """Rename `new` to `path`, whose folder becomes `replaced` and is removed after both renames have succeeded."""
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
    # folders as well: after a power failure a file whose folder was not synced may have no name
    for entry in [folder, *folder.rglob("*")]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Create a hard link to a file, or a copy on a file system without links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class HashingFile(io.BufferedWriter):
    """A new file whose SHA-256 is computed as it is written, so that it is not read again. It cannot seek."""

    def __init__(self, path: Path) -> None:
        """Create or replace `path`."""
        super().__init__(io.FileIO(path, "wb"))
        self.path, self.digest, self.num_bytes = path, hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        self.digest.update(content)
        self.num_bytes += memoryview(content).nbytes
        return super().write(content)

    def seek(self, *position: int) -> int:
        raise io.UnsupportedOperation("a hashed file is written from start to end")

    def describe(self) -> dict[str, Any]:
        """Return the size and the hash of the file, as in a manifest."""
        return {"bytes": self.num_bytes, "sha256": self.digest.hexdigest()}


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, in about 1.5 s per GB."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fill_template(package: str, name: str, **values: Any) -> str:
    """Return the text of a Jinja template of a package with these values. Raises an error for a missing value."""
    from jinja2 import Environment, StrictUndefined

    text = resources.files(package).joinpath(name).read_text(encoding="utf-8")
    templates = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    return templates.from_string(text).render(values)
