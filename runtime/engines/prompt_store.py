"""Keep evaluated prompts on disk, so that a model continues them after a restart.

A file holds the tokens and the state of one sequence. It belongs to a key: the hash of the model, and the build and
the settings that the format of the state depends on. Prompts may be private, so only the user can read the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..base.errors import EfficientLLMError
from ..base.files import written_atomically
from ..base.progress import PROGRESS_LOGGER
from ..base.quantities import format_bytes
from .cache_pool import CachePool, ParkedCache, is_much_like

MIN_STORED_TOKENS = 64
"""Least length of a prompt that is stored. A shorter one is evaluated as fast as it is read."""

SUFFIX = ".prompt"
MAX_HEADER_BYTES = 1000


class PromptStore:
    """The stored prompts of one model in a folder that all models share."""

    def __init__(self, folder: Path, key: str, max_bytes: int) -> None:
        """Use the files of `key`. All files in `folder` together have at most `max_bytes`."""
        self._folder, self._key, self._max_bytes = folder, key, max_bytes

    def save(self, caches: CachePool) -> None:
        """Write all caches, without those that are much like others."""
        # the last used one is written last: the times of the files are their order in `read`
        for cache in reversed(caches.states(MIN_STORED_TOKENS)):
            self.write(cache.tokens, cache.state)

    def restore(self, caches: CachePool) -> int:
        """Park the newest prompts that fit, and return the number of their tokens.

        Prompts that are much like a newer one are left out, as in `save`.
        """
        found: list[ParkedCache] = []
        room = caches.max_parked
        for tokens, state in self.read():
            if is_much_like(tokens, found):
                continue
            room -= len(tokens)
            if room < 0:
                break
            found.append(ParkedCache(tokens, state))
        for cache in reversed(found):  # the newest is dropped last
            caches.park(cache.tokens, cache.state)
        return sum(len(cache.tokens) for cache in found)

    def write(self, tokens: Sequence[int], state: memoryview) -> None:
        """Store a prompt and remove the files that were used least recently, until all fit. Report a failure."""
        content = np.asarray(tokens, dtype="<i4").tobytes() + state
        digest = hashlib.sha256(content).hexdigest()
        header = json.dumps({"key": self._key, "tokens": len(tokens), "sha256": digest}).encode() + b"\n"
        size = len(header) + len(content)
        # by model and tokens, so that a prompt that is stored again replaces its file
        identity = self._key.encode() + content[: 4 * len(tokens)]
        name = hashlib.sha256(identity).hexdigest()[:32] + SUFFIX
        if size > self._max_bytes:  # it would remove every other prompt and still not fit
            _report(f"a prompt of {len(tokens):,} tokens is not stored: it takes {format_bytes(size)}")
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._trim(self._max_bytes - size, keep=name)
            with written_atomically(self._folder / name) as stream:
                stream.write(header)
                stream.write(content)
        except (OSError, EfficientLLMError) as error:
            _report(f"a prompt is not stored: {error}")

    def _trim(self, room: int, keep: str) -> None:
        """Remove the oldest files until the others have at most `room` bytes. The file `keep` will be replaced."""
        states = [(path.stat(), path) for path in self._files() if path.name != keep]
        states.sort(key=lambda pair: pair[0].st_mtime_ns, reverse=True)
        for state, path in states:
            room -= state.st_size
            if room < 0:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return list(self._folder.glob(f"*{SUFFIX}"))

    def read(self) -> Iterator[tuple[list[int], memoryview]]:
        """Yield tokens and state of every prompt of this key, the newest first. A damaged file is removed."""
        with contextlib.suppress(OSError):
            for path in sorted(self._files(), key=lambda path: path.stat().st_mtime_ns, reverse=True):
                try:
                    found = self._read(path)
                except (ValueError, KeyError, TypeError) as error:
                    _report(f"stored prompt {path} is damaged ({error}); it is removed")
                    path.unlink(missing_ok=True)
                else:
                    if found is not None:
                        yield found

    def _read(self, path: Path) -> tuple[list[int], memoryview] | None:
        """Return tokens and state in a file, None if it has another key. Raise ValueError if it is damaged."""
        with path.open("rb") as stream:
            header = json.loads(stream.readline(MAX_HEADER_BYTES))
            if header["key"] != self._key:
                return None
            content = bytearray(stream.read())
        if hashlib.sha256(content).hexdigest() != header["sha256"]:
            raise ValueError("its hash differs")
        size = 4 * header["tokens"]
        return np.frombuffer(content[:size], dtype="<i4").tolist(), memoryview(content)[size:]


def _report(line: str) -> None:
    logging.getLogger(PROGRESS_LOGGER).warning("%s", line)
