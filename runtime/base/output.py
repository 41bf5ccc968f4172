"""Check and lock the output folder of a command, so that nothing is lost and two commands never write it at once."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from .errors import DiskFullError, UsageError
from .files import FULL, folder_written_atomically, free_bytes, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME = ".efficientllm-lock"
"""Name of the lock inside the output folder, used if its parent cannot be written."""

Foreign = Callable[[Path], list[str]]
"""(folder) -> names of the entries that the command has not written."""


def check_output(
    path: Path, overwrite: bool, foreign: Foreign, inputs: Iterable[str | Path], remedy: str, flag: str = "--output"
) -> None:
    """Raise UsageError unless a command may replace the folder `path` without losing anything.

    Absent and empty folders may be written. Others need `overwrite`, and the same command must have written everything
    in them. The current folder, the home folder, the `inputs` and folders that contain one of these are refused. The
    message for a folder that is not empty ends with `remedy`. `flag` is the argument's name in messages.
    """
    inputs = list(inputs)
    for name in (path, *inputs):
        _check_name(str(name))
    if path.exists() and not path.is_dir():  # a file, a device, a socket
        raise UsageError(f"{flag} {path} is not a folder; name one")
    target = _resolved(path)
    places = {"the current folder": Path.cwd(), "the home folder": Path.home()}
    places |= {f"{name}, which is read": Path(name) for name in inputs if Path(name).exists()}
    for description, place in places.items():
        if place.resolve().is_relative_to(target):
            raise UsageError(f"{flag} {path} is or holds {description}; name another folder")
    if not path.is_dir() or all(entry.name == LOCK_NAME for entry in path.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{flag} {path} is not empty; {remedy}")
    if others := foreign(path):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UsageError(
            f"{flag} {path} holds {others[0]}{more}, not written by this command; --overwrite deletes only what was: "
            "move it away or name another folder"
        )


def unknown_files(folder: Path, files: Collection[str], is_ours: Callable[[Path, str], bool]) -> list[str]:
    """Return the relative names of all entries of `folder` except `files` that `is_ours` accepts, and their folders."""
    kept = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    names = {path: path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != LOCK_NAME}

    def is_known(path: Path, name: str) -> bool:
        if name in files and path.is_file() and not path.is_symlink():
            return is_ours(path, name)
        return name in kept and path.is_dir()

    return sorted(name for path, name in names.items() if not is_known(path, name))


def check_file(flag: str, path: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Raise UsageError unless a command may write the file `path`.

    Its folder must exist and be writable. It must not be a folder, one of `inputs`, or inside one of them. `flag` is
    for the message.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{flag} {path}: its folder does not exist")
    if not _takes_files(folder):
        raise UsageError(f"{flag} {path}: {folder} cannot be written; name a file elsewhere")
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; name a file")
    target = _resolved(path)
    for name in inputs:
        if Path(name).exists() and target.is_relative_to(Path(name).resolve()):
            raise UsageError(f"{flag} {path} is or is inside {name}, which is read; name another file")


def check_place(path: Path, is_renamed: bool, flag: str = "--output") -> None:
    """Raise UsageError unless the folder `path` can be created or written, or renamed into if `is_renamed`.

    Raise DiskFullError if nothing is free there.
    """
    place = _resolved(path)
    if is_renamed and os.path.ismount(place):
        raise UsageError(f"{flag} {path} is a mount point, which cannot be replaced; name a folder in it")
    written = place.parent if is_renamed or not place.exists() else place
    existing = next(folder for folder in (written, *written.parents) if folder.exists())
    if not existing.is_dir():
        raise UsageError(f"{flag} {path}: {existing} is not a folder; name another one")
    if not _takes_files(existing):
        raise UsageError(f"{flag} {path}: {existing} cannot be written; name another folder")
    if not free_bytes(existing):
        raise DiskFullError(path, "0 B are free")


def _takes_files(folder: Path) -> bool:
    """Tell whether a file can be created in `folder`. Permissions do not tell it of /proc. A full disk takes files."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.errno in FULL
    return True


@contextlib.contextmanager
def atomic_output(
    path: Path, overwrite: bool, foreign: Foreign, inputs: Iterable[str | Path], remedy: str, flag: str = "--output"
) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` if the block succeeds. If it raises, `path` stays as it was.

    Raises UsageError as `check_output` and `check_place` do, before and after the lock is taken.
    """
    inputs = list(inputs)

    def check() -> None:
        check_output(path, overwrite, foreign, inputs, remedy, flag)
        check_place(path, is_renamed=True, flag=flag)

    check()
    with locked_output(path, flag):
        check()  # again, because another command may have ended since
        with folder_written_atomically(path) as temporary:
            yield temporary


def _check_name(name: str) -> None:
    """Raise UsageError if a path is not UTF-8."""
    try:
        name.encode()  # Python passes such bytes of an argument as surrogates, which have no encoding
    except UnicodeEncodeError as error:
        raise UsageError(f"the name {name!a} is not UTF-8; give another one") from error


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (RuntimeError, ValueError) as error:  # links in a circle, a zero byte
        raise UsageError(f"{str(path)!a} is not a usable path: {error}") from error


@contextlib.contextmanager
def locked_output(path: Path, flag: str = "--output") -> Iterator[None]:
    """Lock the output folder `path` during the block. Raises UsageError that names the process with the lock.

    The lock is a file beside the folder, or inside it if its parent cannot be written.
    """
    _check_name(str(path))
    folder = _resolved(path)
    lock_path = folder.with_name(f".{folder.name}{LOCK_NAME}")
    if folder.is_dir() and not os.access(folder.parent, os.W_OK):
        lock_path = folder / LOCK_NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        lock = _acquire(lock_path, f"{flag} {path}")
    try:
        yield
    finally:
        # removed while it is locked: a process that opened the file before sees that it is gone, see `_acquire`
        lock_path.unlink(missing_ok=True)
        lock.close()


def _acquire(lock_path: Path, shown: str) -> IO[str]:
    while True:
        lock = lock_path.open("a+", encoding="utf-8")
        if not _try_lock(lock):
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise UsageError(f"{shown} is being written by {holder}; wait for it or name another folder")
        # the process that had the lock may have removed the file after we opened it
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), lock_path.stat()):
                break
        lock.close()
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    lock.flush()
    return lock


def _try_lock(lock: IO[str]) -> bool:
    if fcntl is None:  # on Windows two commands may write one folder
        return True
    try:
        # the kernel releases it when the process ends, so that a killed command leaves no lock
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
