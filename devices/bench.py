"""The benchmark itself: artefacts take turns on a device, and a run that was cut short goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ..runtime.base.progress import PROGRESS_LOGGER
from ..runtime.engines.artefact import Artefact
from .device import Device, DeviceOptions, open_device
from .results import BenchOptions, DeviceInfo, Measurement, Run, summarize

POLL_SECONDS = 5.0
"""Between two looks at the temperature of a device that is to cool down."""


class Journal:
    """Measurements of an unfinished run, kept beside its --json file, one line each."""

    def __init__(self, path: Path | None, key: str) -> None:
        self._path = path
        self._key = key
        self._done: dict[tuple[str, int], Measurement] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:  # the line that was being written when the run was cut off
            return
        if entry["key"] == self._key:
            self._done[entry["sha256"], entry["round"]] = Measurement.from_json(entry["measurement"])

    def get(self, sha256: str, turn: int) -> Measurement | None:
        """What an interrupted run measured of an artefact in round `turn`, counted from 0."""
        return self._done.get((sha256, turn))

    def add(self, sha256: str, turn: int, measurement: Measurement) -> None:
        if self._path is not None:
            entry = {"key": self._key, "sha256": sha256, "round": turn, "measurement": asdict(measurement)}
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def journal_for(json_path: Path | None, device: DeviceInfo, options: BenchOptions) -> Journal:
    """The journal of a run; measurements of another device or with other options do not count."""
    path = json_path.with_name(f"{json_path.name}.partial") if json_path else None
    key = hashlib.sha256(json.dumps([asdict(device), asdict(options)], sort_keys=True).encode()).hexdigest()[:16]
    return Journal(path, key)


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
        artefact.verify()
    info = device.describe()
    device.prepare(list(artefacts), options)
    journal = journal_for(json_path, info, options)
    raw: list[list[Measurement]] = [[] for _ in artefacts]
    for turn in range(options.rounds):
        for index, artefact in enumerate(artefacts):
            done = journal.get(artefact.sha256, turn)
            label = f"round {turn + 1}/{options.rounds}: {artefact.path}"
            if done is None:
                cool_down(device, options, say)
                say(label)
                done = device.measure(artefact, options)
                journal.add(artefact.sha256, turn, done)
            else:
                say(f"{label} (measured before the interruption)")
            raw[index].append(done)
    results = [
        summarize(
            str(artefact.path),
            artefact.sha256,
            artefact.engine,
            artefact.file_bytes,
            asdict(artefact.manifest) if artefact.manifest else {},
            runs,
        )
        for artefact, runs in zip(artefacts, raw, strict=True)
    ]
    run = Run(info, options, results)
    if json_path:
        run.write(json_path)
    journal.remove()
    return run


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
