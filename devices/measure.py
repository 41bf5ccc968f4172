"""Child process that measures one artefact in its engine: `python -m efficientllm.devices.measure REQUEST`.

REQUEST is JSON (see `Request`); the result, a `Measurement` as JSON, is the last line of standard output. A fresh
process per artefact keeps peak memory and caches apart. A board runs this module in its own environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..runtime.base.command import run_command
from ..runtime.engines.artefact import Artefact
from ..runtime.engines.engine import EngineOptions, engine_build, engine_version, load_engine
from ..runtime.engines.memory import huge_page_bytes, memory_bytes
from .results import BenchOptions, Measurement
from .sensors import LocalShell, both, clock_mhz, energy_meter, temperature_celsius

READ_PASSES = 5
"""Timed readings of as much memory as the artefact takes, after one that warms up."""


@dataclass(frozen=True)
class Request:
    """What to measure."""

    artefact: str
    context: int
    """Window to allocate; 0: what the tests need."""
    options: dict[str, Any]
    """Fields of BenchOptions."""


class Span(NamedTuple):
    """Seconds since a test began."""

    wall: float
    cpu: float
    """Of all threads of this process: what other processes take does not count."""


class Stopwatch:
    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Span:
        return Span(time.perf_counter() - self._wall, time.process_time() - self._cpu)


class Decoder(Protocol):
    """What the tests ask of an engine, ours or a peer's."""

    context_length: int
    vocab_size: int
    load_ms: float
    kv_cache_bytes: int
    settings: str

    def prefill(self, tokens: Sequence[int]) -> np.ndarray: ...

    def decode(self, token: int) -> np.ndarray: ...

    def close(self) -> None: ...


class Bench:
    """The tests of one loaded engine, on random tokens: speed does not depend on what they mean."""

    def __init__(self, engine: Decoder, options: BenchOptions) -> None:
        self._engine = engine
        self._options = options
        self._random = np.random.default_rng(0)
        self._first_token = 0
        self.speeds: dict[str, list[float]] = {}
        self.cpu_ms_per_token: dict[str, list[float]] = {}
        self.quiet_ms_per_token: dict[str, list[float]] = {}
        self.first_token_ms: list[float] = []
        self.joules_per_token: list[float] = []
        self.skipped: dict[str, str] = {}

    def repeat(self) -> None:
        """One repetition of every test."""
        shortest, longest = min(self._options.decode_tokens), max(self._options.decode_tokens)
        for number, length in enumerate(self._options.prompt_tokens):
            if self._fits(f"pp{length}", length):
                span = self._prefill(length)
                self._record(f"pp{length}", length, span)
                if number == 0:
                    self.first_token_ms.append(1000 * span.wall)
        decodes = [length for length in self._options.decode_tokens if self._fits(f"tg{length}", length + 1)]
        if decodes:
            self._prefill(1)
            ends = self._decode(max(decodes), measure_energy=max(decodes) == longest)
            for length in decodes:
                self._record_decode(f"tg{length}", ends[:length])
        for depth in self._options.depths:
            name = f"tg{shortest}@d{depth}"
            if depth and self._fits(name, depth + shortest):
                self._prefill(depth)
                self._record_decode(name, self._decode(shortest))

    def forget(self) -> None:
        """Drop what the repetition that warms up recorded."""
        self.speeds, self.cpu_ms_per_token, self.quiet_ms_per_token = {}, {}, {}
        self.first_token_ms, self.joules_per_token = [], []

    def _fits(self, test: str, tokens: int) -> bool:
        if tokens <= self._engine.context_length:
            return True
        self.skipped[test] = f"needs a context of {tokens} tokens, the artefact holds {self._engine.context_length}"
        return False

    def _record(self, test: str, tokens: int, span: Span) -> None:
        self.speeds.setdefault(test, []).append(tokens / span.wall)
        self.cpu_ms_per_token.setdefault(test, []).append(1000 * span.cpu / tokens)

    def _record_decode(self, test: str, ends: list[Span]) -> None:
        self._record(test, len(ends), ends[-1])
        for name, seconds in ((test, [end.wall for end in ends]), (f"{test} CPU", [end.cpu for end in ends])):
            quartile = np.quantile(np.diff(seconds, prepend=0.0), 0.25)
            self.quiet_ms_per_token.setdefault(name, []).append(1000 * float(quartile))

    def _tokens(self, count: int) -> list[int]:
        return self._random.integers(self._engine.vocab_size, size=count).tolist()

    def _prefill(self, length: int) -> Span:
        """A full prefill: another first token than the last time, so nothing cached is reused."""
        self._first_token = (self._first_token + 1) % self._engine.vocab_size
        tokens = [self._first_token, *self._tokens(length - 1)]
        watch = Stopwatch()
        self._engine.prefill(tokens)
        return watch.read()

    def _decode(self, length: int, measure_energy: bool = False) -> list[Span]:
        """From the first token to the end of each."""
        tokens, ends = self._tokens(length), []
        if not measure_energy:
            return self._timed(tokens)
        with energy_meter(LocalShell(), time.perf_counter) as energy:
            ends = self._timed(tokens)
        if energy.joules is not None:
            self.joules_per_token.append(energy.joules / length)
        return ends

    def _timed(self, tokens: list[int]) -> list[Span]:
        ends = []
        watch = Stopwatch()
        for token in tokens:
            self._engine.decode(token)
            ends.append(watch.read())
        return ends


def measure(request: Request) -> Measurement:
    """Load and time every test; weights are read, not mapped, so that RSS counts them once."""
    options = BenchOptions.from_json(request.options)
    baseline = memory_bytes().get("rss_bytes", 0)
    context = request.context or options.context
    artefact = Artefact.open(request.artefact)
    settings = EngineOptions(options.threads, context, huge_pages=options.huge_pages, kv_cache=options.kv_cache)
    engine = load_engine(artefact, settings, probe=False)
    measured = measure_engine(engine, options, engine_version(artefact.engine), baseline)
    # after everything else, whose peak of memory it would raise
    read = read_speed(artefact.file_bytes, options.threads)
    return replace(measured, engine_build=engine_build(artefact.engine), memory_bytes_per_second=read)


def measure_engine(engine: Decoder, options: BenchOptions, version: str, baseline_rss_bytes: int) -> Measurement:
    """Time every test of a loaded engine, after a repetition that warms up, and close it."""
    shell, bench = LocalShell(), Bench(engine, options)
    degrees_before = temperature_celsius(shell)
    bench.repeat()
    bench.forget()
    clock_before = clock_mhz(shell, options.threads)
    for _ in range(options.repetitions):
        bench.repeat()
    clock_after, degrees_after = clock_mhz(shell, options.threads), temperature_celsius(shell)
    memory, huge_pages = memory_bytes(), huge_page_bytes()
    engine.close()
    return Measurement(
        speeds=bench.speeds,
        cpu_ms_per_token=bench.cpu_ms_per_token,
        quiet_ms_per_token=bench.quiet_ms_per_token,
        engine_version=version,
        threads=options.threads or os.cpu_count() or 1,
        load_ms=[engine.load_ms],
        time_to_first_token_ms=bench.first_token_ms,
        peak_rss_bytes=memory["peak_rss_bytes"],
        rss_anon_bytes=memory.get("rss_anon_bytes", 0),
        rss_file_bytes=memory.get("rss_file_bytes", 0),
        huge_page_bytes=huge_pages,
        baseline_rss_bytes=baseline_rss_bytes,
        kv_cache_bytes=engine.kv_cache_bytes,
        engine_settings=engine.settings,
        temperature_celsius=both(degrees_before, degrees_after),
        clock_mhz=both(clock_before, clock_after),
        joules_per_token=bench.joules_per_token,
        skipped=bench.skipped,
    )


def read_speed(size: int, threads: int) -> list[float]:
    """Bytes per second at which `threads` (0: all cores) read a buffer of `size` bytes, READ_PASSES times."""
    count = threads or os.cpu_count() or 1
    parts = np.array_split(np.ones(max(size // 4, count), np.float32), count)  # ones: zeros would all be one page
    speeds = []
    with ThreadPoolExecutor(count) as pool:
        for _ in range(1 + READ_PASSES):
            watch = Stopwatch()
            list(pool.map(np.max, parts))  # it lets go of the interpreter
            speeds.append(size / watch.read().wall)
    return speeds[1:]


def body(argv: Sequence[str]) -> int:
    print(json.dumps(asdict(measure(Request(**json.loads(argv[0]))))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
