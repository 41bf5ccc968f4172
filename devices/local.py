"""Measuring artefacts on this machine, in turn, each time in a fresh process."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..runtime.engine import locate
from ..runtime.errors import ArtefactError
from ..runtime.manifest import Manifest
from . import measure


@dataclass(frozen=True)
class BenchOptions:
    """measurement"""

    prompt_tokens: int = 128
    """Tokens of the timed prefill."""
    decode_tokens: int = 64
    """Tokens decoded one by one after it."""
    repetitions: int = 3
    """Timed repetitions per process, after one that warms up."""
    rounds: int = 3
    """Processes per artefact; artefacts take turns, so that drift of the machine hits all alike."""
    threads: int = 0
    """CPU threads; 0: all cores."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "decode_tokens", "repetitions", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be positive")
        if self.threads < 0:
            raise ValueError(f"--threads {self.threads}: must not be negative")


@dataclass(frozen=True)
class Figure:
    """One quantity over all repetitions."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


@dataclass(frozen=True)
class Result:
    """Figures of one artefact."""

    artefact: str
    engine: str
    file_bytes: int
    manifest: dict[str, Any]
    """Contents of the artefact's manifest; empty for a bare file."""
    load_ms: Figure
    prefill_tokens_per_second: Figure
    decode_tokens_per_second: Figure
    peak_rss_bytes: int
    """Largest over the rounds, weights read into memory."""
    rss_anon_bytes: int
    """Allocations at the end, of the same process as peak_rss_bytes' largest; 0 where the system does not say."""
    rss_file_bytes: int
    """Mapped files at the end (libraries; weights too where they are mapped)."""
    baseline_rss_bytes: int


def bench_local(artefacts: Sequence[str], options: BenchOptions, say: Callable[[str], None]) -> list[Result]:
    """Measure every artefact; ArtefactError where one cannot be loaded."""
    located = [locate(Path(artefact)) for artefact in artefacts]
    raw: list[list[dict[str, Any]]] = [[] for _ in artefacts]
    for turn in range(options.rounds):
        for index, artefact in enumerate(artefacts):
            say(f"round {turn + 1}/{options.rounds}: {artefact}")
            raw[index].append(_measure_in_child(artefact, options))
    return [
        _summarise(artefact, engine, file, runs)
        for artefact, (engine, file), runs in zip(artefacts, located, raw, strict=True)
    ]


def _measure_in_child(artefact: str, options: BenchOptions) -> dict[str, Any]:
    request = measure.Request(
        artefact, options.prompt_tokens, options.decode_tokens, options.repetitions, options.threads
    )
    command = [sys.executable, "-m", measure.__name__, json.dumps(asdict(request))]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ArtefactError(f"{artefact}: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return json.loads(done.stdout.splitlines()[-1])


def _summarise(artefact: str, engine: str, file: Path, runs: list[dict[str, Any]]) -> Result:
    def pooled(name: str) -> Figure:
        return Figure.of([value for run in runs for value in run[name]])

    largest = max(runs, key=lambda run: run["peak_rss_bytes"])
    folder = Path(artefact)
    manifest = Manifest.read(folder) if folder.is_dir() else None
    return Result(
        artefact=artefact,
        engine=engine,
        file_bytes=manifest.total_bytes if manifest else file.stat().st_size,
        manifest=asdict(manifest) if manifest else {},
        load_ms=Figure.of([run["load_ms"] for run in runs]),
        prefill_tokens_per_second=pooled("prefill_tokens_per_second"),
        decode_tokens_per_second=pooled("decode_tokens_per_second"),
        peak_rss_bytes=largest["peak_rss_bytes"],
        rss_anon_bytes=largest["rss_anon_bytes"],
        rss_file_bytes=largest["rss_file_bytes"],
        baseline_rss_bytes=max(run["baseline_rss_bytes"] for run in runs),
    )
