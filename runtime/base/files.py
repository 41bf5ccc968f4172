"""Files that are whole or absent: write beside, sync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .disk import writing


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
