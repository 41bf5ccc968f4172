"""What an unfinished run has measured, kept beside its --json file, one line of JSON each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .results import BenchOptions, DeviceInfo, Measurement

Place = tuple[str, int, int]
"""Of a measurement: SHA-256 of the artefact, how many before it in the run have the same, the round from 0."""


class Journal:
    """Lines of another device, of other options and of another release stay as they are and do not count."""

    def __init__(self, path: Path | None, key: str, say: Callable[[str], None]) -> None:
        """Read what `path`, if it exists, holds; `say` is told about lines that were cut off or damaged."""
        self._path, self._key = path, key
        self._done: dict[Place, Measurement] = {}
        if path is not None and path.is_file():
            self._read(path, say)

    def _read(self, path: Path, say: Callable[[str], None]) -> None:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                entry = json.loads(line)
                place = (entry["sha256"], entry["copy"], entry["round"])
                if entry["key"] == self._key:
                    self._done[place] = Measurement.from_json(entry["measurement"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                say(f"{path}: line {number} was cut off or damaged; what it held is measured again")

    def get(self, place: Place) -> Measurement | None:
        """What an interrupted run measured there."""
        return self._done.get(place)

    def add(self, place: Place, measurement: Measurement) -> None:
        """Write a line, to the disk; a line that was cut off before it is ended first."""
        if self._path is None:
            return
        sha256, copy, turn = place
        entry = {"key": self._key, "sha256": sha256, "copy": copy, "round": turn, "measurement": asdict(measurement)}
        with self._path.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def journal_path(json_path: Path) -> Path:
    """Beside the file that the run will write."""
    return json_path.with_name(f"{json_path.name}.partial")


def journal_for(
    json_path: Path | None, device: DeviceInfo, options: BenchOptions, release: str, say: Callable[[str], None]
) -> Journal:
    """The journal of a run on `device` by `release` of this package."""
    path = journal_path(json_path) if json_path else None
    text = json.dumps([asdict(device), asdict(options), release], sort_keys=True)
    return Journal(path, hashlib.sha256(text.encode()).hexdigest()[:16], say)
