"""The benchmark itself: artefacts take turns on a device, and a run that was cut short goes on where it stopped.

What an unfinished run has measured, kept beside its --json file, one line of JSON each.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ..runtime.base.progress import PROGRESS_LOGGER
from ..runtime.base.user_cache import commit
from ..runtime.engines.artefact import Artefact
from ..runtime.engines.engine import check_engine
from .bare_gguf import Described, describe_gguf
from .device import Device, DeviceOptions, open_device
from .results import BenchOptions, DeviceInfo, Measurement, Result, Run, summarize

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


POLL_SECONDS = 5.0
"""Between two looks at the temperature of a device that is to cool down."""


def log_progress(line: str) -> None:
    """Tell whoever waits for the run; a program that did not ask to see messages sees nothing."""
    logging.getLogger(PROGRESS_LOGGER).info(line)


def benchmark(
    artefacts: Sequence[str | Path | Artefact],
    options: BenchOptions | None = None,
    device: str | DeviceOptions = "local",
    json_path: Path | None = None,
) -> Run:
    """Measure artefacts side by side, as efficientllm-bench does.

        run = benchmark(["source-gguf", "pruned-gguf"], BenchOptions(rounds=1), device="ssh://pi@raspberrypi")
        print(run.results[0].speeds["tg64"].median, "tokens/s")

    `device` is --device, or all options of the device; with `json_path` the run is written there, and goes on from
    where an earlier one was cut short. Raises ArtefactError, DeviceError and UsageError.
    """
    opened = [path if isinstance(path, Artefact) else Artefact.open(path) for path in artefacts]
    where = DeviceOptions(device=device) if isinstance(device, str) else device
    with contextlib.closing(open_device(where, log_progress)) as target:
        return bench(target, opened, options or BenchOptions(), log_progress, json_path)


def bench(
    device: Device,
    artefacts: Sequence[Artefact],
    options: BenchOptions,
    say: Callable[[str], None],
    json_path: Path | None = None,
) -> Run:
    """Measure every artefact `options.rounds` times, in turn; `say` is told about every process."""
    for artefact in artefacts:
        check_engine(artefact)
        artefact.verify()
    info, release = device.describe(), importlib.metadata.version("efficientllm")
    device.prepare(list(artefacts), options)
    journal = journal_for(json_path, info, options, release, say)
    raw: list[list[Measurement]] = [[] for _ in artefacts]
    hashes = [artefact.sha256 for artefact in artefacts]
    for turn in range(options.rounds):
        for index, artefact in enumerate(artefacts):
            place = (hashes[index], hashes[:index].count(hashes[index]), turn)
            done = journal.get(place)
            label = f"round {turn + 1}/{options.rounds}: {artefact.path}"
            if done is None:
                cool_down(device, options, say)
                say(label)
                done = device.measure(artefact, options)
                journal.add(place, done)
            else:
                say(f"{label} (measured before the interruption)")
            raw[index].append(done)
    results = [result for artefact, runs in zip(artefacts, raw, strict=True) for result in results_of(artefact, runs)]
    ended = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run = Run(info, options, results, ended, release, commit())
    if json_path:
        run.write(json_path)
    journal.remove()
    return run


def results_of(artefact: Artefact, runs: Sequence[Measurement]) -> list[Result]:
    """One result per version of the engine: where it was updated before a run went on, figures are not pooled."""
    manifest, described = asdict(artefact.manifest) if artefact.manifest else {}, describe(artefact)
    by_version: dict[str, list[Measurement]] = {}
    for measured in runs:
        by_version.setdefault(measured.engine_version, []).append(measured)
    pooled = (
        summarize(str(artefact.path), artefact.sha256, artefact.engine, artefact.file_bytes, manifest, group)
        for group in by_version.values()
    )
    return [replace(result, **asdict(described)) for result in pooled]


def describe(artefact: Artefact) -> Described:
    """Parameters and type, by the manifest or by the header of a bare .gguf file."""
    if artefact.manifest is not None:
        return Described(artefact.manifest.architecture.get("num_parameters", 0), artefact.manifest.quantization)
    return describe_gguf(artefact.model_file) if artefact.model_file.suffix == ".gguf" else Described()


def cool_down(
    device: Device,
    options: BenchOptions,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until the device is at most --max-temp warm, --cool-down-minutes at the longest."""
    if not options.max_temp:
        return
    waited = 0.0
    while (degrees := device.temperature_celsius()) is not None and degrees > options.max_temp:
        if waited >= 60 * options.cool_down_minutes:
            say(f"still at {degrees:.1f} C after {options.cool_down_minutes:g} minutes; measuring nevertheless")
            return
        if waited == 0:
            say(f"waiting for the device to cool from {degrees:.1f} to {options.max_temp:g} C")
        sleep(POLL_SECONDS)
        waited += POLL_SECONDS
    if degrees is None:
        say("the device does not tell its temperature; --max-temp has no effect")
