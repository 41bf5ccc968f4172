"""The one schema of benchmark results: what was asked for, on which device, and what came out."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..runtime.base import flags
from ..runtime.base.errors import UsageError
from ..runtime.base.files import write_json_atomically
from ..runtime.base.quantities import Figure
from ..runtime.base.typed import check_value
from ..runtime.engines.engine import CacheChoice

SCHEMA_VERSION = 3


def _with_tuples(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """JSON has lists only."""
    return values | {name: tuple(values[name]) for name in names if values.get(name) is not None}


@dataclass(frozen=True)
class BenchOptions:
    """measurement"""

    prompt_tokens: tuple[int, ...] = flags.whole_numbers(128, 512, at_least=1)
    """Lengths of the timed prefills: pp128, pp512 as llama-bench names them."""
    decode_tokens: tuple[int, ...] = flags.whole_numbers(64, 128, at_least=1)
    """Tokens decoded one by one from an empty context: tg64, tg128."""
    depths: tuple[int, ...] = flags.whole_numbers(512, 1536, at_least=0)
    """Contexts already filled when the shortest decode is timed again: tg64@d512; 0: none."""
    repetitions: int = flags.number(3, at_least=1)
    """Timed repetitions per process, after one that warms up."""
    rounds: int = flags.number(3, at_least=1)
    """Processes per artefact; artefacts take turns, so that drift of the machine hits all alike."""
    threads: int = flags.number(0, at_least=0)
    """CPU threads; 0: all cores."""
    kv_cache: CacheChoice = "auto"
    """gguf: what keys and values are stored as; auto: what is fastest, as measured on the device."""
    huge_pages: bool = True
    """Linux: move what was read into huge pages, as efficientllm-chat and -serve do."""
    max_temp: float = flags.number(0.0, at_least=0)
    """Degrees Celsius the device must have cooled to before each process; 0: do not wait."""
    cool_down_minutes: float = flags.number(15.0, at_least=0)
    """Longest wait for that."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        for name in ("prompt_tokens", "decode_tokens"):
            flags.require(self, name, bool(getattr(self, name)), "give at least one number")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BenchOptions:
        return cls(**_with_tuples(values, ("prompt_tokens", "decode_tokens", "depths")))

    @property
    def context(self) -> int:
        """Tokens of context that the longest test needs."""
        decode = min(self.decode_tokens) + max(self.depths, default=0)
        return max(*self.prompt_tokens, max(self.decode_tokens) + 1, decode) + 1


@dataclass(frozen=True)
class DeviceInfo:
    """The machine that ran the artefacts."""

    name: str
    """As it was given to --device."""
    system: str
    """Operating system and release."""
    machine: str
    """Instruction set: x86_64, aarch64, ..."""
    cpu: str
    cores: int
    ram_bytes: int
    """0 where the device does not tell."""
    board: str = ""
    """Model of the board or phone."""
    known: dict[str, Any] = field(default_factory=dict)
    """Entry of the table of known devices: SoC, cores, RAM."""
    virtual: str = ""
    """What lies between programs and hardware: qemu-user, virtual machine (kvm), ...; "" where nothing was found."""
    emulated: bool = False
    """Whether it translates instructions: then no figure says anything about the device."""


Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Readings(Generic[Sample]):
    """What is read of one artefact; a Sample is what one process or several say of one figure."""

    speeds: dict[str, Sample]
    """Tokens per second by test: pp128, tg64, tg64@d512, ..."""
    cpu_ms_per_token: dict[str, Sample] = field(default_factory=dict)
    """CPU time of all threads by test, beside the wall time that `speeds` counts: other processes do not add to it.

    Empty where the program on the device does not tell.
    """
    quiet_ms_per_token: dict[str, Sample] = field(default_factory=dict)
    """First quartile over the tokens of a decode, by test, of wall time, and of CPU time under "TEST CPU".

    What the machine does beside it disturbs some tokens, and these hardly. Empty as above.
    """
    load_ms: Sample | None = None
    time_to_first_token_ms: Sample | None = None
    """From the first test's prompt to its first token."""
    joules_per_token: Sample | None = None
    """Of the whole package, system on chip or battery, over the longest decode."""
    engine_version: str = ""
    engine_build: str = ""
    """What it says of its build: commit, instruction sets."""
    threads: int = 0
    peak_rss_bytes: int = 0
    """Weights are read, not mapped, so that they are counted once."""
    rss_anon_bytes: int = 0
    """Allocations at the end; 0 where the system does not say."""
    rss_file_bytes: int = 0
    """Mapped files at the end (libraries)."""
    huge_page_bytes: int = 0
    """Of the allocations at the end, what lies in huge pages; 0 where the system does not say."""
    baseline_rss_bytes: int = 0
    """Resident memory of Python and its libraries before the model was loaded."""
    kv_cache_bytes: int = 0
    """Key/value caches at the context measured; 0 where the file does not tell."""
    engine_settings: str = ""
    """What the engine chose for the device, such as the attention kernel."""
    memory_bytes_per_second: Sample | None = None
    """What as many threads read of a buffer as large as the artefact, in the same process: no decoded token can be
    faster than that takes for all weights."""
    temperature_celsius: tuple[float, float] | None = None
    """Before the first repetition and after the last."""
    clock_mhz: tuple[float, float] | None = None
    """Mean over the cores that work, the moment a decode has ended: after warming up (on a phone: while it measures, at
    the beginning) and after the last repetition; of several processes the one whose clock fell most."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Tests that do not fit the artefact, with the reason."""


@dataclass(frozen=True)
class Measurement(Readings[list[float]]):
    """What one process measured; lists have one entry per repetition."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Measurement:
        """TypeError, AttributeError or ValueError where it is none."""
        found = cls(**_with_tuples(values, ("temperature_celsius", "clock_mhz")))
        check_value(found, Measurement, "it", {Sample: list[float]})
        if not all(value > 0 for values in found.speeds.values() for value in values) or 0 in (found.clock_mhz or ()):
            raise ValueError("a speed or a clock is not positive")
        return found


@dataclass(frozen=True, kw_only=True)
class Result(Readings[Figure]):
    """Figures of one artefact over the repetitions of all processes."""

    artefact: str
    sha256: str
    """Of the model file, or of the list of files with their hashes where there are several."""
    engine: str
    file_bytes: int
    manifest: dict[str, Any]
    """Contents of the artefact's manifest; empty for a bare file."""
    throttled: str
    """The drop of the clock that was seen, "" where there was none."""
    process_medians: dict[str, list[float]] = field(default_factory=dict)
    """Median of each process by test of `speeds`: where a process came to lie in memory is part of its speed."""
    num_parameters: int = 0
    """0 where the artefact does not tell."""
    quantization: str = ""
    """As its exporter calls it; "" where the artefact does not tell."""

    def check(self) -> None:
        """ValueError where a figure is none that a measurement gives."""
        figures = [*self.speeds.values(), *self.cpu_ms_per_token.values(), *self.quiet_ms_per_token.values()]
        figures += filter(None, [self.memory_bytes_per_second])
        if any(min(figure.low, figure.median, figure.high) <= 0 for figure in figures):
            raise ValueError(f"{self.artefact}: a figure is not positive")
        if self.file_bytes <= 0 or self.num_parameters < 0 or not all(self.clock_mhz or (1.0,)):
            raise ValueError(f"{self.artefact}: bytes, parameters or clock cannot be")

    @property
    def spread_of_processes(self) -> dict[str, float]:
        """By how much of the slowest process the fastest is faster, by test; nothing of a single process."""
        medians = {test: values for test, values in self.process_medians.items() if len(values) > 1}
        return {test: max(values) / min(values) - 1 for test, values in medians.items()}

    def share_of_bandwidth(self, test: str) -> float | None:
        """How near a decode is to the limit of reading every byte of the artefact once per token: 1 is at it."""
        if self.memory_bytes_per_second is None or test not in self.speeds:
            return None
        return self.speeds[test].median * self.file_bytes / self.memory_bytes_per_second.median

    def quiet_ms(self, test: str, clock: str) -> float:
        """Milliseconds per token of a test, of CPU ("cpu") or wall time: whatever else the machine does only adds to
        what a token takes, so the better quartile, of a decode that over its tokens."""
        named = f"{test} CPU" if clock == "cpu" else test
        if named in self.quiet_ms_per_token:
            return self.quiet_ms_per_token[named].median
        return self.cpu_ms_per_token[test].low if clock == "cpu" else 1000 / self.speeds[test].high


def mean_context(test: str) -> float | None:
    """Tokens before one that a decode computes (tg64, tg64@d512), on average: a decode of n has (n - 1) / 2 of its own;
    None for a prefill."""
    match = re.fullmatch(r"tg(\d+)(?:@d(\d+))?", test)
    return int(match[2] or 0) + (int(match[1]) - 1) / 2 if match else None


def labels(results: Sequence[Result]) -> list[str]:
    """A name for each: as much of its path's end as tells it from the others, its engine where only that differs."""
    paths = {result.artefact for result in results}
    names = [_shortest_end(result.artefact, paths) for result in results]
    for name in {name for name in names if names.count(name) > 1}:
        same = [index for index, other in enumerate(names) if other == name]
        versions = [results[index].engine_version for index in same]
        tell_apart = versions if len(set(versions)) == len(versions) else map(str, range(1, len(same) + 1))
        for index, text in zip(same, tell_apart, strict=True):
            names[index] = f"{name} ({text})"
    return names


def _shortest_end(path: str, paths: Collection[str]) -> str:
    parts = Path(path).parts
    others = [Path(other).parts for other in paths if other != path]
    for count in range(1, len(parts)):
        if all(other[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-count:])
    return path


THROTTLING_DROP = 0.15
"""Share of the clock whose loss between warm-up and end is reported."""


def summarize(
    artefact: str, sha256: str, engine: str, file_bytes: int, manifest: dict[str, Any], runs: Sequence[Measurement]
) -> Result:
    """Pool the repetitions of all processes; memory is that of the process with the largest peak."""
    largest = max(runs, key=lambda run: run.peak_rss_bytes)
    temperatures = [run.temperature_celsius for run in runs if run.temperature_celsius]
    clocks = [run.clock_mhz for run in runs if run.clock_mhz]
    clock = min(clocks, key=lambda pair: pair[1] / pair[0], default=None)
    return Result(
        speeds=_pool_by_test([run.speeds for run in runs]),
        cpu_ms_per_token=_pool_by_test([run.cpu_ms_per_token for run in runs]),
        quiet_ms_per_token=_pool_by_test([run.quiet_ms_per_token for run in runs]),
        load_ms=_pool([run.load_ms for run in runs]),
        time_to_first_token_ms=_pool([run.time_to_first_token_ms for run in runs]),
        joules_per_token=_pool([run.joules_per_token for run in runs]),
        memory_bytes_per_second=_pool([run.memory_bytes_per_second for run in runs]),
        engine_settings=", or ".join(dict.fromkeys(run.engine_settings for run in runs)),
        engine_version=runs[0].engine_version,
        engine_build=runs[0].engine_build,
        threads=runs[0].threads,
        peak_rss_bytes=largest.peak_rss_bytes,
        rss_anon_bytes=largest.rss_anon_bytes,
        rss_file_bytes=largest.rss_file_bytes,
        huge_page_bytes=largest.huge_page_bytes,
        baseline_rss_bytes=max(run.baseline_rss_bytes for run in runs),
        kv_cache_bytes=largest.kv_cache_bytes,
        temperature_celsius=(temperatures[0][0], temperatures[-1][1]) if temperatures else None,
        skipped={name: reason for run in runs for name, reason in run.skipped.items()},
        process_medians=_medians_by_test([run.speeds for run in runs]),
        artefact=artefact,
        sha256=sha256,
        engine=engine,
        file_bytes=file_bytes,
        manifest=manifest,
        clock_mhz=clock,
        throttled=_throttling(*clock) if clock else "",
    )


def _pool(samples: Sequence[list[float] | None]) -> Figure | None:
    values = [value for sample in samples for value in sample or ()]
    return Figure.of(values) if values else None


def _pool_by_test(samples: Sequence[dict[str, list[float]]]) -> dict[str, Figure]:
    tests = dict.fromkeys(test for sample in samples for test in sample)
    figures = {test: _pool([sample.get(test) for sample in samples]) for test in tests}
    return {test: figure for test, figure in figures.items() if figure}


def _medians_by_test(samples: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    tests = dict.fromkeys(test for sample in samples for test in sample)
    return {test: [statistics.median(sample[test]) for sample in samples if sample.get(test)] for test in tests}


def _throttling(first: float, last: float) -> str:
    """A large drop in words, "" for a small one."""
    return f"clock fell from {first:.0f} to {last:.0f} MHz" if last < (1 - THROTTLING_DROP) * first else ""


@dataclass(frozen=True)
class Run:
    """One call of efficientllm-bench: the contents of its JSON file."""

    device: DeviceInfo
    options: BenchOptions
    results: list[Result]
    """In the order asked for; measurements of one artefact by several engine versions are results of their own."""
    measured_at: str = ""
    """End of the run: date and time, UTC, as ISO 8601."""
    efficientllm_version: str = ""
    efficientllm_commit: str = ""
    """"" where it was not run from its repository."""
    schema_version: int = SCHEMA_VERSION

    @property
    def labels(self) -> list[str]:
        """A name for each result that no other has."""
        return labels(self.results)

    def write(self, path: Path) -> None:
        write_json_atomically(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read what --json wrote; UsageError where the file is missing or something else."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UsageError(f"{path} does not exist; give a file written by efficientllm-bench --json") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
            raise UsageError(f"{path} is not a result of efficientllm-bench of schema {SCHEMA_VERSION}; measure again")
        try:
            check_value(values["results"], list[Any], "results")
            run = cls(
                DeviceInfo(**values["device"]),
                BenchOptions.from_json(values["options"]),
                [_result(entry) for entry in values["results"]],
                values.get("measured_at", ""),
                values.get("efficientllm_version", ""),
                values.get("efficientllm_commit", ""),
            )
            check_value(run, Run, "it", {Sample: Figure})
            for result in run.results:
                result.check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{path} is damaged ({error}); measure again") from error
        return run


def _result(values: dict[str, Any]) -> Result:
    read: dict[str, Any] = _with_tuples(values, ("temperature_celsius", "clock_mhz"))
    for name in ("load_ms", "time_to_first_token_ms", "joules_per_token", "memory_bytes_per_second"):
        read[name] = Figure(**values[name]) if values.get(name) else None
    manifest = values["manifest"]  # older files have these there alone
    read.setdefault("num_parameters", manifest.get("architecture", {}).get("num_parameters", 0))
    read.setdefault("quantization", manifest.get("quantization", ""))
    for name, figures in (
        ("speeds", values["speeds"]),
        ("cpu_ms_per_token", values["cpu_ms_per_token"]),
        ("quiet_ms_per_token", values.get("quiet_ms_per_token", {})),  # older files lack them
    ):
        read[name] = {test: Figure(**entry) for test, entry in figures.items()}
    return Result(**read)
