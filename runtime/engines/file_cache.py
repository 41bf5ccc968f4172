"""Cache results derived from files per user, so that a second load neither hashes nor measures again.

A result is stored under the device, inode, size and times of the files, because every write changes one of them. The
cache is one JSON file. If it is missing, damaged or not writable, results are computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..base.errors import DiskFullError
from ..base.files import write_json_atomically
from ..base.user_cache import cache_folder

CACHE_FILE = "file_cache.json"
MAX_RESULTS = 1000
"""Largest number of stored results. The oldest are removed first."""

SETTLED_SECONDS = 2.0
"""A file changed less than this ago may change again within one tick of its clock. Its results are not stored."""


def cached(key: str, files: Sequence[Path], compute: Callable[[], str], is_valid: Callable[[str], bool] = bool) -> str:
    """Return the stored result of `key` for the content of `files`, or compute and store it.

    An empty result is not stored, and a stored one that is not valid is computed again.
    """
    before = file_identity(files)
    key = f"{key}: {before}"
    path = cache_folder() / CACHE_FILE
    stored = _read_results(path).get(key)
    if stored is not None and is_valid(stored):
        return stored
    result = compute()
    # A file that changed during the computation, or may still change unnoticed, gets no stored result.
    changed = max(max(state.st_mtime, state.st_ctime) for state in map(Path.stat, files))
    if result and time.time() - changed > SETTLED_SECONDS and file_identity(files) == before:
        with contextlib.suppress(OSError, DiskFullError):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Read again: another process may have stored results meanwhile.
            results = [*_read_results(path).items(), (key, result)][-MAX_RESULTS:]
            write_json_atomically(path, dict(results))
    return result


def file_identity(files: Sequence[Path]) -> str:
    """Return a hash of numbers that change with the content of `files`."""
    states = [file.stat() for file in files]
    numbers = [(state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states]
    return hashlib.sha256(repr(numbers).encode()).hexdigest()


def _read_results(path: Path) -> dict[str, str]:
    """Return the stored results, {} if the file is missing or damaged."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_sound = isinstance(results, dict) and all(isinstance(result, str) for result in results.values())
    return results if is_sound else {}
