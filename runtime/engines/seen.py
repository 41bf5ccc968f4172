"""What this user's earlier processes found out about files, so that a second load does not ask again.

A finding is kept under the file's device, inode, size and times: whatever writes to the file changes one of them. The
cache is one JSON file; without it, or where it cannot be written, everything is found out anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..base.files import write_json_atomically
from ..base.user_cache import cache_folder

LARGEST = 1000
"""Findings that are kept; the oldest go first."""

SETTLED_SECONDS = 2.0
"""A file changed less than this ago could change again within one tick of its clock: nothing is kept of it."""


def once(
    question: str, files: Sequence[Path], find_out: Callable[[], str], is_answer: Callable[[str], bool] = bool
) -> str:
    """The answer to `question` about the content of `files`: the kept one, or `find_out()`, which is kept then.

    An empty answer is not kept, nor is what `find_out` raises; a kept one that is none (`is_answer`) is found anew.
    """
    before = _identity(files)
    key = f"{question}: {before}"
    path = cache_folder() / "seen.json"
    kept = _read(path).get(key)
    if kept is not None and is_answer(kept):
        return kept
    answer = find_out()
    changed = max(max(state.st_mtime, state.st_ctime) for state in map(Path.stat, files))
    if answer and time.time() - changed > SETTLED_SECONDS and _identity(files) == before:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            answers = [*_read(path).items(), (key, answer)][-LARGEST:]
            write_json_atomically(path, dict(answers))
    return answer


def _identity(files: Sequence[Path]) -> str:
    """Numbers that change with the content; a list of many files is one hash."""
    states = [file.stat() for file in files]
    numbers = [(one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in states]
    return hashlib.sha256(repr(numbers).encode()).hexdigest()


def _read(path: Path) -> dict[str, str]:
    """The findings; none where there is no such file or it is damaged."""
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return answers if isinstance(answers, dict) and all(isinstance(one, str) for one in answers.values()) else {}
