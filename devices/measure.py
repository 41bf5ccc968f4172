"""Child process that measures one artefact in its engine: `python -m efficientllm.devices.measure REQUEST`.

REQUEST is JSON (see `Request`). The result, a `Measurement` as JSON, is the last line of standard output. A new
process per artefact separates peak memory and caches. A board runs this module in its own environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..runtime.base.command import run_command
from ..runtime.engines.artefact import Artefact
from ..runtime.engines.engine import EngineOptions, engine_build, engine_version, load_engine
from ..runtime.engines.memory import memory_bytes
from .results import BenchOptions, Measurement
from .sensors import LocalShell, clock_mhz, energy_meter, pair_of, temperature_celsius


@dataclass(frozen=True)
class Request:
    """The artefact to measure, and the settings."""

    artefact: str
    context: int
    """Context to allocate, in tokens; 0: the need of the tests."""
    options: dict[str, Any]
    """Fields of BenchOptions."""


class Elapsed(NamedTuple):
    """Seconds since a stopwatch started."""

    wall: float
    cpu: float
    """CPU time of all threads of this process."""


class Stopwatch:
    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Elapsed:
        return Elapsed(time.perf_counter() - self._wall, time.process_time() - self._cpu)


class Decoder(Protocol):
    """The part of an engine that the tests use."""

    context_length: int
    vocab_size: int
    load_ms: float
    kv_cache_bytes: int

    @property
    def settings(self) -> str: ...

    def prefill(self, tokens: Sequence[int]) -> np.ndarray: ...

    def decode(self, token: int) -> np.ndarray: ...

    def close(self) -> None: ...


class EngineTests:
    """The tests of one loaded engine. Tokens are random, because the speed does not depend on their meaning."""

    def __init__(self, engine: Decoder, options: BenchOptions) -> None:
        self._engine = engine
        self._options = options
        self._random = np.random.default_rng(0)
        self._first_token = 0
        self.skipped: dict[str, str] = {}
        self.reset()

    def reset(self) -> None:
        """Discard all readings, as after the warm-up."""
        self.speeds: dict[str, list[float]] = {}
        self.cpu_ms_per_token: dict[str, list[float]] = {}
        self.quiet_ms_per_token: dict[str, list[float]] = {}
        self.first_token_ms: list[float] = []
        self.joules_per_token: list[float] = []

    def repeat(self) -> None:
        """Run one repetition of each test."""
        shortest, longest = min(self._options.decode_tokens), max(self._options.decode_tokens)
        for number, length in enumerate(self._options.prompt_tokens):
            if self._fits(f"pp{length}", length):
                elapsed = self._prefill(length)
                self._record(f"pp{length}", length, elapsed)
                if number == 0:
                    self.first_token_ms.append(1000 * elapsed.wall)
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

    def _fits(self, test: str, tokens: int) -> bool:
        if tokens <= self._engine.context_length:
            return True
        self.skipped[test] = f"needs a context of {tokens} tokens, the artefact holds {self._engine.context_length}"
        return False

    def _record(self, test: str, tokens: int, elapsed: Elapsed) -> None:
        self.speeds.setdefault(test, []).append(tokens / elapsed.wall)
        self.cpu_ms_per_token.setdefault(test, []).append(1000 * elapsed.cpu / tokens)

    def _record_decode(self, test: str, ends: list[Elapsed]) -> None:
        self._record(test, len(ends), ends[-1])
        clocks = {test: [end.wall for end in ends], f"{test} CPU": [end.cpu for end in ends]}
        for name, seconds in clocks.items():
            # the quartile, as other work on the machine only ever adds time
            of_each_token = np.diff(seconds, prepend=0.0)
            quartile = np.quantile(of_each_token, 0.25)
            self.quiet_ms_per_token.setdefault(name, []).append(1000 * float(quartile))

    def _random_tokens(self, count: int) -> list[int]:
        return self._random.integers(self._engine.vocab_size, size=count).tolist()

    def _prefill(self, length: int) -> Elapsed:
        """Evaluate a prompt whose first token differs from the last prompt's, so that no cached token is reused."""
        self._first_token = (self._first_token + 1) % self._engine.vocab_size
        tokens = [self._first_token, *self._random_tokens(length - 1)]
        watch = Stopwatch()
        self._engine.prefill(tokens)
        return watch.read()

    def _decode(self, length: int, measure_energy: bool = False) -> list[Elapsed]:
        """Decode `length` tokens and return the time from the start to the end of each."""
        tokens = self._random_tokens(length)  # drawn before the clock starts
        if not measure_energy:
            return self._timed_decode(tokens)
        with energy_meter(LocalShell(), time.perf_counter) as energy:
            ends = self._timed_decode(tokens)
        if energy.joules is not None:
            self.joules_per_token.append(energy.joules / length)
        return ends

    def _timed_decode(self, tokens: list[int]) -> list[Elapsed]:
        ends = []
        watch = Stopwatch()
        for token in tokens:
            self._engine.decode(token)
            ends.append(watch.read())
        return ends


def measure(request: Request) -> Measurement:
    """Load an artefact and time each test after a warm-up repetition."""
    options = BenchOptions.from_json(request.options)
    artefact = Artefact.open(request.artefact)
    context = request.context or options.context
    threads = options.threads or os.cpu_count() or 1  # 0 would follow the load of the machine
    # weights are read, not mapped, so that RSS counts them once; the artefact was checked when the bench began
    settings = EngineOptions(threads, context, huge_pages=options.huge_pages, kv_cache=options.kv_cache)
    engine = load_engine(artefact, settings, probe=False)
    shell, tests = LocalShell(), EngineTests(engine, options)
    celsius_before = temperature_celsius(shell)
    tests.repeat()  # the warm-up: first passes read weights from disk and allocate
    tests.reset()
    clock_before = clock_mhz(shell, options.threads)
    for _ in range(options.repetitions):
        tests.repeat()
    # at once, because an idle processor lowers its clock
    clock_after, celsius_after = clock_mhz(shell, options.threads), temperature_celsius(shell)
    measurement = Measurement(
        speeds=tests.speeds,
        cpu_ms_per_token=tests.cpu_ms_per_token,
        quiet_ms_per_token=tests.quiet_ms_per_token,
        engine_version=engine_version(artefact.engine),
        engine_build=engine_build(artefact.engine),
        threads=threads,
        load_ms=[engine.load_ms],
        time_to_first_token_ms=tests.first_token_ms,
        peak_rss_bytes=memory_bytes()["peak_rss_bytes"],
        kv_cache_bytes=engine.kv_cache_bytes,
        engine_settings=engine.settings,
        temperature_celsius=pair_of(celsius_before, celsius_after),
        clock_mhz=pair_of(clock_before, clock_after),
        joules_per_token=tests.joules_per_token,
        skipped=tests.skipped,
    )
    engine.close()
    return measurement


def body(argv: Sequence[str]) -> int:
    print(json.dumps(asdict(measure(Request(**json.loads(argv[0]))))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
