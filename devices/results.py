"""Schema of benchmark results: the options, the device and the figures of a run."""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..runtime.base import flags
from ..runtime.base.files import write_json_atomically
from ..runtime.base.quantities import Figure
from ..runtime.base.typed import check_value
from ..runtime.engines.engine import CacheChoice

SCHEMA_VERSION = 3
THROTTLING_DROP = 0.15
"""Smallest relative drop of the clock between warm-up and end that is reported as throttling."""
PAIRS = ("temperature_celsius", "clock_mhz")
"""Fields of `Readings` that are tuples, which JSON stores as lists."""


def _with_tuples(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return values | {name: tuple(values[name]) for name in names if values.get(name) is not None}


@dataclass(frozen=True)
class BenchOptions:
    """Measurement."""

    prompt_tokens: tuple[int, ...] = flags.whole_numbers(128, 512, at_least=1)
    """Prompt lengths of the timed prefills, named pp128 and pp512 as in llama-bench."""
    decode_tokens: tuple[int, ...] = flags.whole_numbers(64, 128, at_least=1)
    """Numbers of tokens to decode one by one from an empty context, named tg64 and tg128."""
    depths: tuple[int, ...] = flags.whole_numbers(512, 1536, at_least=0)
    """Tokens already in the context when the shortest decode is timed again, named tg64@d512; 0: none."""
    repetitions: int = flags.number(3, at_least=1)
    """Timed repetitions per process, after one that warms up."""
    rounds: int = flags.number(3, at_least=1)
    """Processes per artefact. Artefacts take turns, so that a drift of the machine affects all of them alike."""
    threads: int = flags.number(0, at_least=0)
    """CPU threads; 0: all cores."""
    kv_cache: CacheChoice = "auto"
    """gguf: storage type of keys and values; auto: the fastest, as measured on the device."""
    huge_pages: bool = True
    """Linux: move the loaded model into huge pages, as efficientllm-chat and -serve do."""
    max_temp: float = flags.number(0.0, at_least=0)
    """Degrees Celsius to which the device must cool before each process; 0: do not wait."""
    cool_down_minutes: float = flags.number(15.0, at_least=0)
    """Longest wait for --max-temp, in minutes."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        for name in ("prompt_tokens", "decode_tokens"):
            flags.require(self, name, bool(getattr(self, name)), "give at least one number")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BenchOptions:
        return cls(**_with_tuples(values, ("prompt_tokens", "decode_tokens", "depths")))

    @property
    def context(self) -> int:
        """Return the tokens of context that the longest test needs."""
        decode = min(self.decode_tokens) + max(self.depths, default=0)
        return max(*self.prompt_tokens, max(self.decode_tokens) + 1, decode) + 1


@dataclass(frozen=True)
class DeviceInfo:
    """The machine that ran the artefacts."""

    name: str
    """Value of --device."""
    system: str
    """Operating system and release."""
    machine: str
    """Instruction set, such as x86_64 or aarch64."""
    cpu: str
    cores: int
    ram_bytes: int
    """0 if the device does not report it."""
    board: str = ""
    """Model of the board or phone."""
    emulator: str = ""
    """Program that translates instructions, such as qemu-user, so that no figure describes the device; "" if none was
    found."""


Value = TypeVar("Value")


@dataclass(frozen=True)
class Readings(Generic[Value]):
    """Readings of one artefact. A Value holds one figure, of one process or pooled over several."""

    speeds: dict[str, Value]
    """Tokens per second by test: pp128, tg64, tg64@d512, ..."""
    cpu_ms_per_token: dict[str, Value] = field(default_factory=dict)
    """CPU time of all threads by test, to which other processes do not add. Empty if the program does not report it."""
    quiet_ms_per_token: dict[str, Value] = field(default_factory=dict)
    """First quartile over the tokens of a decode, by test: wall time, and CPU time as "TEST CPU".

    Other work of the machine disturbs some tokens, and the first quartile hardly. Empty as `cpu_ms_per_token`.
    """
    load_ms: Value | None = None
    time_to_first_token_ms: Value | None = None
    """Time from the first test's prompt to its first token."""
    joules_per_token: Value | None = None
    """Energy of the whole package, system on chip or battery during the longest decode."""
    engine_version: str = ""
    engine_build: str = ""
    """Commit and instruction sets of the engine, as it reports them."""
    threads: int = 0
    peak_rss_bytes: int = 0
    """Peak resident memory. Weights are read, not mapped, so that they are counted once."""
    kv_cache_bytes: int = 0
    """Bytes of the KV cache at the measured context; 0 if unknown."""
    engine_settings: str = ""
    """Settings that the engine chose for the device, such as the attention kernel."""
    temperature_celsius: tuple[float, float] | None = None
    """Temperature before the first repetition and after the last."""
    clock_mhz: tuple[float, float] | None = None
    """Mean clock of the working cores at the end of a decode: after warm-up, and after the last repetition.

    On a phone the first value is from the beginning of the measurement. Of several processes, the one whose clock
    dropped most.
    """
    skipped: dict[str, str] = field(default_factory=dict)
    """Maps each test that does not fit the artefact to the reason."""


@dataclass(frozen=True)
class Measurement(Readings[list[float]]):
    """Readings of one process. Lists have one entry per repetition."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Measurement:
        """Return the measurement in `values`. Raises TypeError, AttributeError or ValueError for other content."""
        measurement = cls(**_with_tuples(values, PAIRS))
        check_value(measurement, Measurement, "it", {Value: list[float]})
        speeds = [speed for samples in measurement.speeds.values() for speed in samples]
        if not all(speed > 0 for speed in speeds) or 0 in (measurement.clock_mhz or ()):
            raise ValueError("a speed or a clock is not positive")
        return measurement


@dataclass(frozen=True, kw_only=True)
class Result(Readings[Figure]):
    """Figures of one artefact over the repetitions of all processes."""

    artefact: str
    sha256: str
    """SHA-256 of the model file, or of the list of files and hashes if there are several."""
    engine: str
    file_bytes: int
    manifest: dict[str, Any]
    """Contents of the artefact's manifest; empty for a bare file."""
    throttled: str
    """Description of a drop of the clock; "" if none was seen."""
    process_medians: dict[str, list[float]] = field(default_factory=dict)
    """Median of each process by test of `speeds`. The placement of a process in memory affects its speed."""
    num_parameters: int = 0
    """0 if the artefact does not contain it."""
    quantization: str = ""
    """Weight type, as its exporter calls it; "" if the artefact does not contain it."""

    @property
    def spread_of_processes(self) -> dict[str, float]:
        """Return by test the relative gap between the fastest and the slowest process. Empty for one process."""
        medians = {test: values for test, values in self.process_medians.items() if len(values) > 1}
        return {test: max(values) / min(values) - 1 for test, values in medians.items()}

    def quiet_ms(self, test: str, clock: str) -> float:
        """Return the milliseconds per token of a test, of CPU time ("cpu") or wall time.

        Other work of the machine only adds time, so this is the better quartile: over the tokens of a decode, else
        over the repetitions.
        """
        name = f"{test} CPU" if clock == "cpu" else test
        if name in self.quiet_ms_per_token:
            return self.quiet_ms_per_token[name].median
        return self.cpu_ms_per_token[test].low if clock == "cpu" else 1000 / self.speeds[test].high


def mean_context(test: str) -> float | None:
    """Return the mean number of tokens before a decoded one (tg64, tg64@d512), and None for a prefill."""
    match = re.fullmatch(r"tg(\d+)(?:@d(\d+))?", test)
    return int(match[2] or 0) + (int(match[1]) - 1) / 2 if match else None


def _shortest_end(path: str, paths: Collection[str]) -> str:
    parts = Path(path).parts
    others = [Path(other).parts for other in paths if other != path]
    for count in range(1, len(parts)):
        if all(other[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-count:])
    return path


def summarize(
    artefact: str, sha256: str, engine: str, file_bytes: int, manifest: dict[str, Any], runs: Sequence[Measurement]
) -> Result:
    """Pool the repetitions of all processes. Memory figures are those of the process with the largest peak."""
    largest = max(runs, key=lambda run: run.peak_rss_bytes)
    temperatures = [run.temperature_celsius for run in runs if run.temperature_celsius]
    clocks = [run.clock_mhz for run in runs if run.clock_mhz]
    clock = min(clocks, key=lambda pair: pair[1] / pair[0], default=None)  # the process that throttled most
    return Result(
        artefact=artefact,
        sha256=sha256,
        engine=engine,
        file_bytes=file_bytes,
        manifest=manifest,
        speeds=_pool_by_test([run.speeds for run in runs]),
        cpu_ms_per_token=_pool_by_test([run.cpu_ms_per_token for run in runs]),
        quiet_ms_per_token=_pool_by_test([run.quiet_ms_per_token for run in runs]),
        load_ms=_pool([run.load_ms for run in runs]),
        time_to_first_token_ms=_pool([run.time_to_first_token_ms for run in runs]),
        joules_per_token=_pool([run.joules_per_token for run in runs]),
        engine_settings=", or ".join(dict.fromkeys(run.engine_settings for run in runs)),
        engine_version=runs[0].engine_version,
        engine_build=runs[0].engine_build,
        threads=runs[0].threads,
        peak_rss_bytes=largest.peak_rss_bytes,
        kv_cache_bytes=largest.kv_cache_bytes,
        # before the first process and after the last one
        temperature_celsius=(temperatures[0][0], temperatures[-1][1]) if temperatures else None,
        clock_mhz=clock,
        throttled=_throttling(*clock) if clock else "",
        skipped={name: reason for run in runs for name, reason in run.skipped.items()},
        process_medians=_medians_by_test([run.speeds for run in runs]),
    )


def _pool(samples: Sequence[list[float] | None]) -> Figure | None:
    values: list[float] = []
    for sample in samples:
        values += sample or []
    return Figure.of(values) if values else None


def _pool_by_test(samples: Sequence[dict[str, list[float]]]) -> dict[str, Figure]:
    tests = dict.fromkeys(test for sample in samples for test in sample)
    figures = {test: _pool([sample.get(test) for sample in samples]) for test in tests}
    return {test: figure for test, figure in figures.items() if figure}


def _medians_by_test(samples: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    tests = dict.fromkeys(test for sample in samples for test in sample)
    return {test: [statistics.median(sample[test]) for sample in samples if sample.get(test)] for test in tests}


def _throttling(first: float, last: float) -> str:
    """Return a description of a large drop of the clock, and "" for a small one."""
    return f"clock fell from {first:.0f} to {last:.0f} MHz" if last < (1 - THROTTLING_DROP) * first else ""


@dataclass(frozen=True)
class Run:
    """One call of efficientllm-bench: the contents of its JSON file."""

    device: DeviceInfo
    options: BenchOptions
    results: list[Result]
    """Results in the order of the arguments. Each engine version of an artefact has a result of its own."""
    measured_at: str = ""
    """End of the run in UTC, as ISO 8601."""
    efficientllm_version: str = ""
    efficientllm_commit: str = ""
    """Commit of the repository; "" if it was not run from there."""
    schema_version: int = SCHEMA_VERSION

    @property
    def labels(self) -> list[str]:
        """Return a unique name per result: the shortest distinct end of its path, with its engine version if needed."""
        paths = {result.artefact for result in self.results}
        names = [_shortest_end(result.artefact, paths) for result in self.results]
        for name in {name for name in names if names.count(name) > 1}:
            indices = [index for index, other in enumerate(names) if other == name]
            versions = [self.results[index].engine_version for index in indices]
            is_distinct = len(set(versions)) == len(versions)
            suffixes = versions if is_distinct else map(str, range(1, len(indices) + 1))
            for index, suffix in zip(indices, suffixes, strict=True):
                names[index] = f"{name} ({suffix})"
        return names

    @property
    def labelled(self) -> list[tuple[str, Result]]:
        """Return the results with their labels."""
        return list(zip(self.labels, self.results, strict=True))

    def write(self, path: Path) -> None:
        write_json_atomically(path, asdict(self))
