"""The folder that a command writes: what it may replace, and that nobody else writes it meanwhile."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from .errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Foreign = Callable[[Path], list[str]]
"""(folder) -> names of what lies in it and the command has not written."""


def check_output(path: Path, overwrite: bool, foreign: Foreign, inputs: Iterable[str | Path], remedy: str) -> None:
    """UsageError unless a command may write the folder `path` anew without losing anything.

    Absent and empty folders may be written, others with `overwrite` where everything in them was written by the same
    command. Never the current folder, the home, a root, one of the `inputs`, or a folder that holds one of these.
    """
    if path.is_file():
        raise UsageError(f"--output {path} is a file; name a folder")
    target = path.resolve()
    places = {"the current folder": Path.cwd(), "the home folder": Path.home()}
    for what, place in places.items():
        if target == place.resolve() or target in place.resolve().parents:
            raise UsageError(f"--output {path} is or holds {what}; name a folder of its own")
    for name in inputs:
        source = Path(name)
        if source.exists() and (target == source.resolve() or target in source.resolve().parents):
            raise UsageError(f"--output {path} is or holds {name}, which is read; name another folder")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"--output {path} is not empty; {remedy}")
    others = foreign(path)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UsageError(
            f"--output {path} holds {others[0]}{more}, not written by this command; --overwrite deletes only what was: "
            "move it away or name another folder"
        )


@contextlib.contextmanager
def locked_output(path: Path) -> Iterator[None]:
    """Hold the output folder `path` for the block; UsageError names the process that holds it already.

    The lock is a file beside the folder. The kernel releases it with the process, however that ends.
    """
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    lock_path = path.resolve().with_name(f".{path.resolve().name}.efficientllm-lock")
    lock = _acquire(lock_path, path)
    try:
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        lock.close()


def _acquire(lock_path: Path, path: Path) -> IO[str]:
    while True:
        lock = lock_path.open("a+", encoding="utf-8")
        if not _try_lock(lock):
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise UsageError(f"--output {path} is being written by {holder}; wait for it or name another folder")
        # whoever held it last may have removed the file between our opening and locking it
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), lock_path.stat()):
                break
        lock.close()
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    lock.flush()
    return lock


def _try_lock(lock: IO[str]) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
