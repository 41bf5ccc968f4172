"""The benchmark: artefacts take turns on a device, and an interrupted run resumes from its journal."""

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
from typing import cast

from ..runtime.base.errors import UsageError
from ..runtime.base.progress import PROGRESS_LOGGER
from ..runtime.base.quantities import format_duration
from ..runtime.base.user_cache import commit
from ..runtime.engines.artefact import Artefact, describe_gguf
from ..runtime.engines.engine import CacheChoice, find_engine
from ..runtime.latency.profile import DeviceProfile
from .device import Device, DeviceOptions, open_device
from .results import BenchOptions, DeviceInfo, Measurement, Result, Run, summarize

POLL_SECONDS = 5.0
"""Seconds between two temperature readings of a device that cools down."""
MeasurementKey = tuple[str, int, int]
"""SHA-256 of the artefact, number of equal artefacts before it in the run, and round from 0."""


class Journal:
    """Measurements of an unfinished run, one JSON object a line, beside its --json file.

    Lines with another key belong to another device, other options or another release. They stay and are ignored.
    """

    def __init__(self, path: Path | None, key: str, log: Callable[[str], None]) -> None:
        """Read `path` if it exists. `log` is told about incomplete and damaged lines."""
        self._path, self._key = path, key
        self._done: dict[MeasurementKey, Measurement] = {}
        if path is not None and path.is_file():
            self._read(path, log)

    def _read(self, path: Path, log: Callable[[str], None]) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                key = (entry["sha256"], entry["copy"], entry["round"])
                if entry["key"] == self._key:
                    self._done[key] = Measurement.from_json(entry["measurement"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                log(f"{path}: line {number} is incomplete or damaged; its measurement is repeated")

    def get(self, key: MeasurementKey) -> Measurement | None:
        """Return the measurement of an interrupted run, if there is one."""
        return self._done.get(key)

    def add(self, key: MeasurementKey, measurement: Measurement) -> None:
        """Write a line and flush it to disk, after terminating an incomplete line before it."""
        if self._path is None:
            return
        sha256, copy, turn = key
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
    """Return the path of the journal beside the file that a run writes."""
    return json_path.with_name(f"{json_path.name}.partial")


def open_journal(
    json_path: Path | None, device: DeviceInfo, options: BenchOptions, release: str, log: Callable[[str], None]
) -> Journal:
    """Return the journal of a run on `device` by `release` of this package."""
    path = journal_path(json_path) if json_path else None
    text = json.dumps([asdict(device), asdict(options), release], sort_keys=True)
    return Journal(path, hashlib.sha256(text.encode()).hexdigest()[:16], log)


def log_progress(line: str) -> None:
    """Log a line of progress, which is shown only if the program enabled these messages."""
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

    `device` is the value of --device, or all options of the device. With `json_path`, the run is written to that
    file, and an interrupted run resumes. Raises ArtefactError, DeviceError and UsageError.
    """
    opened = [path if isinstance(path, Artefact) else Artefact.open(path) for path in artefacts]
    device_options = DeviceOptions(device=device) if isinstance(device, str) else device
    with contextlib.closing(open_device(device_options, log_progress)) as target:
        return bench(target, opened, options or BenchOptions(), log_progress, json_path)


def bench(
    device: Device,
    artefacts: Sequence[Artefact],
    options: BenchOptions,
    log: Callable[[str], None],
    json_path: Path | None = None,
) -> Run:
    """Measure each artefact `options.rounds` times, in turn. `log` is told about each process."""
    for artefact in artefacts:
        find_engine(artefact)
        artefact.verify()
    info, release = device.describe(), importlib.metadata.version("efficientllm")
    device.prepare(list(artefacts), options)
    journal = open_journal(json_path, info, options, release, log)
    measurements: list[list[Measurement]] = [[] for _ in artefacts]
    hashes = [artefact.sha256 for artefact in artefacts]
    began, num_measured = time.monotonic(), 0
    # in turn, so that a device that grows warm, or busy, slows all artefacts alike
    for turn in range(options.rounds):
        for index, artefact in enumerate(artefacts):
            # the count tells apart two artefacts with the same files
            key = (hashes[index], hashes[:index].count(hashes[index]), turn)
            measurement = journal.get(key)
            label = f"round {turn + 1}/{options.rounds}, {index + 1}/{len(artefacts)}: {artefact.path}"
            if measurement is None:
                cool_down(device, options, log)
                missing = len(artefacts) * (options.rounds - turn) - index
                remaining = (time.monotonic() - began) / num_measured * missing if num_measured else 0
                log(label + (f"  ETA {format_duration(remaining)}" if remaining else ""))
                measurement = device.measure(artefact, options)
                journal.add(key, measurement)
                num_measured += 1
            else:
                log(f"{label} (measured before the interruption)")
            measurements[index].append(measurement)
    pairs = zip(artefacts, measurements, strict=True)
    results = [result for artefact, group in pairs for result in results_of(artefact, group)]
    measured_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run = Run(info, options, results, measured_at, release, commit())
    if json_path:
        run.write(json_path)
    journal.remove()
    return run


def as_profiled(options: BenchOptions, profile: DeviceProfile, artefacts: Sequence[Artefact]) -> BenchOptions:
    """Return the options with the cache type of a profile, whose predictions are compared with the measurements.

    Raises UsageError if the profile has another engine, weight type, number of threads or cache type.
    """
    for artefact in artefacts:
        if not (artefact.manifest and artefact.manifest.architecture):
            raise UsageError(f"--predict: {artefact.path} has no widths; give a folder of efficientllm-export")
        quantization = artefact.manifest.quantization
        profile.check(engine=artefact.engine, quantization=quantization, threads=options.threads or None)
    kv_cache = cast(CacheChoice, profile.measured_on.kv_cache)
    if "auto" not in (kv_cache, options.kv_cache) and kv_cache != options.kv_cache:
        raise UsageError(f"--kv-cache {options.kv_cache}: the profile of --predict was measured with {kv_cache}")
    return replace(options, kv_cache=kv_cache) if options.kv_cache == "auto" else options


def results_of(artefact: Artefact, measurements: Sequence[Measurement]) -> list[Result]:
    """Return one result per version of the engine, which may be updated before a run resumes."""
    manifest = asdict(artefact.manifest) if artefact.manifest else {}
    num_parameters, quantization = describe(artefact)
    by_version: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        by_version.setdefault(measurement.engine_version, []).append(measurement)
    pooled = (
        summarize(str(artefact.path), artefact.sha256, artefact.engine, artefact.file_bytes, manifest, group)
        for group in by_version.values()
    )
    return [replace(result, num_parameters=num_parameters, quantization=quantization) for result in pooled]


def describe(artefact: Artefact) -> tuple[int, str]:
    """Return parameters and weight type from the manifest, or from the header of a bare .gguf file."""
    if artefact.manifest is not None:
        return artefact.manifest.architecture.get("num_parameters", 0), artefact.manifest.quantization
    return describe_gguf(artefact.model_file)[1:] if artefact.model_file.suffix == ".gguf" else (0, "")


def cool_down(
    device: Device, options: BenchOptions, log: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
) -> None:
    """Wait until the device has cooled to --max-temp, for at most --cool-down-minutes."""
    if not options.max_temp:
        return
    waited = 0.0
    while (degrees := device.temperature_celsius()) is not None and degrees > options.max_temp:
        if waited >= 60 * options.cool_down_minutes:
            log(f"still at {degrees:.1f} C after {options.cool_down_minutes:g} minutes; measuring nevertheless")
            return
        if waited == 0:
            log(f"waiting for the device to cool from {degrees:.1f} to {options.max_temp:g} C")
        sleep(POLL_SECONDS)
        waited += POLL_SECONDS
    if degrees is None:
        log("the device does not report its temperature; --max-temp has no effect")
