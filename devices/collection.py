"""Results of many devices and artefacts as one page: a headline, a table that sorts, speed against quality and size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from ..runtime.base.figure import Figure
from ..runtime.base.files import write_text_atomically
from ..runtime.base.quantities import format_bytes, format_count
from .results import DeviceInfo, Result, Run


@dataclass(frozen=True)
class Entry:
    """One artefact on one device."""

    label: str
    result: Result
    run: Run
    source: str
    """Where the run's JSON lies, relative to the page."""

    @property
    def device(self) -> str:
        """The board or processor, not the name that --device was given: "local" is everybody's."""
        found = self.run.device
        name = found.board or found.cpu or found.name
        return f"EMULATED {name}" if found.emulated else name

    @property
    def mean_kl(self) -> float | None:
        """Nats per token from the exact file, as its export measured it; 0 for one that is exact; None: not told."""
        manifest = self.result.manifest
        found = (_number_at(manifest, "verification", stage, "mean_kl") for stage in ("quantized", "exact"))
        return next((value for value in found if value is not None), None)

    @property
    def perplexity_ratio(self) -> float | None:
        """Perplexity of the checkpoint, as a multiple of its source's, on text that it was not trained on; 1 of what
        was not trained; None: not told."""
        if not self.result.manifest.get("training"):
            return 1.0
        ratio = _number_at(self.result.manifest, "training", "quality", "texts", "all texts", "ratio")
        return ratio or None

    @property
    def nats_lost(self) -> float | None:
        """Per token, from the source to the checkpoint and from there to the file; None: one of them is not told."""
        ratio, kl = self.perplexity_ratio, self.mean_kl
        return None if ratio is None or kl is None else math.log(ratio) + kl

    def speed(self, kind: str) -> Figure | None:
        """Of the first test of `kind`, pp or tg, without a context before it."""
        tests = (name for name in self.result.speeds if name.startswith(kind) and "@" not in name)
        name = next(tests, None)
        return self.result.speeds[name] if name else None

    @property
    def threads(self) -> int:
        """As counted by the process that measured."""
        return self.result.threads or self.run.options.threads


def _number_at(values: Any, *keys: str) -> float | None:
    """A number deep in a manifest, not negative; None where none stands there."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    is_number = isinstance(values, int | float) and math.isfinite(values) and values >= 0
    return float(values) if is_number else None


def entries(runs: Sequence[tuple[Run, str]]) -> list[Entry]:
    """Every result of (run, where its JSON lies)."""
    pairs = [(run, source, label, result) for run, source in runs for label, result in _labelled(run)]
    return [Entry(label, result, run, source) for run, source, label, result in pairs]


def _labelled(run: Run) -> list[tuple[str, Result]]:
    return list(zip(run.labels, run.results, strict=True))


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number that sorting goes by; None: last."""

    text: str
    order: float | str | None = None
    spread: str = ""
    """Quartiles, in small below."""


def _number(value: float | None, digits: int) -> Cell:
    return Cell("-" if value is None else f"{value:.{digits}f}", value)


def _figure(figure: Figure | None) -> Cell:
    if figure is None:
        return Cell("-")
    digits = figure.digits
    spread = f"{figure.low:.{digits}f}-{figure.high:.{digits}f}" if figure.n > 1 else ""
    return Cell(f"{figure.median:.{digits}f}", figure.median, spread)


def _bytes(count: int) -> Cell:
    return Cell(format_bytes(count), count) if count else Cell("-")


COLUMNS = (
    "artefact", "device", "decode t/s", "prefill t/s", "on disk", "peak memory", "mean KL", "nats lost",
    "J/token", "first token ms", "parameters", "type", "threads", "engine", "measured", "remarks",
)  # fmt: skip
TEXT_COLUMNS = ("artefact", "device", "type", "engine", "measured", "remarks")


def cells(entry: Entry) -> list[Cell]:
    """One row of the table, in the order of COLUMNS."""
    result, run = entry.result, entry.run
    told = [f"THROTTLED: {result.throttled}" if result.throttled else "", run.device.virtual]
    remarks = "; ".join(filter(None, told))
    return [
        Cell(entry.label, entry.label),
        Cell(entry.device, entry.device),
        _figure(entry.speed("tg")),
        _figure(entry.speed("pp")),
        _bytes(result.file_bytes),
        _bytes(result.peak_rss_bytes),
        _number(entry.mean_kl, 4),
        _number(entry.nats_lost, 3),
        _figure(result.joules_per_token),
        _figure(result.time_to_first_token_ms),
        Cell(format_count(result.num_parameters), result.num_parameters) if result.num_parameters else Cell("-"),
        Cell(result.quantization or "-", result.quantization or None),
        Cell(str(entry.threads) if entry.threads else "all", entry.threads or math.inf),
        Cell(result.engine_version or result.engine, result.engine_version or result.engine),
        Cell(run.measured_at[:10] or "-", run.measured_at or None),
        Cell(remarks or "-", remarks or None),
    ]


def headline(found: Sequence[Entry]) -> str:
    """The fastest real decode in one sentence, against the slowest on the same device where there are several."""
    real = [entry for entry in found if not entry.run.device.emulated and entry.speed("tg")]
    if not real:
        return "No decode speed of a real device."

    def decode(entry: Entry) -> float:
        figure = entry.speed("tg")
        return figure.median if figure else 0.0

    best = max(real, key=decode)
    peers = [entry for entry in real if entry.device == best.device]
    slowest = min(peers, key=decode)
    size = format_bytes(best.result.file_bytes)
    text = f"{best.label} decodes {decode(best):.0f} tokens a second on {best.device}, {size}"
    cost = _cost(best)
    if slowest is best:
        return f"{text}.{cost}"
    share, speed = best.result.file_bytes / slowest.result.file_bytes, decode(best) / decode(slowest)
    return f"{text}: {speed:.2f} times as fast as {slowest.label}, at {share:.2f} of its bytes.{cost}"


def _cost(entry: Entry) -> str:
    """A sentence on what was paid for the speed in quality, as far as the manifest tells; else ""."""
    ratio = entry.perplexity_ratio if entry.result.manifest.get("training") else None
    lost = [f"its checkpoint has {ratio:.2f} times the perplexity of its source"] if ratio else []
    kl = entry.mean_kl
    lost += [f"the file is a mean KL of {kl:.2g} away from its checkpoint"] if kl is not None else []
    return f" What that costs: {' and '.join(lost)}." if lost else ""


@dataclass(frozen=True)
class Point:
    """A circle of the plot, in the units of its picture (WIDTH x HEIGHT)."""

    x: float
    y: float
    radius: float
    title: str
    series: int
    """Number of its device, from 0."""


@dataclass(frozen=True)
class Tick:
    """A mark of an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Plot:
    """Decode speed (up) against nats lost (right); areas are bytes."""

    points: list[Point]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    devices: list[str]
    left_out: list[str]
    """Artefacts whose manifest does not tell what was lost."""


WIDTH, HEIGHT, MARGIN = 640, 360, 48
LARGEST_RADIUS = 18.0
MANY = 5
"""Ticks of an axis, about."""


def _steps(high: float) -> list[float]:
    """0 and round numbers up to at least `high`."""
    raw = (high or 1.0) / MANY
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return [step * index for index in range(math.ceil((high or 1.0) / step) + 1)]


def plot(found: Sequence[Entry]) -> Plot | None:
    """None where no artefact has a speed and tells what was lost."""
    known = [(entry, entry.speed("tg"), entry.nats_lost) for entry in found]
    shown = [(entry, speed.median, lost) for entry, speed, lost in known if speed is not None and lost is not None]
    if not shown:
        return None
    x_steps, y_steps = _steps(max(lost for *_, lost in shown)), _steps(max(speed for _, speed, _ in shown))
    devices = list(dict.fromkeys(entry.device for entry, *_ in shown))
    largest = max(entry.result.file_bytes for entry, *_ in shown) or 1

    def x(value: float) -> float:
        return MARGIN + LARGEST_RADIUS + value / x_steps[-1] * (WIDTH - 2 * MARGIN - LARGEST_RADIUS)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - value / y_steps[-1] * (HEIGHT - 2 * MARGIN)

    points = [
        Point(
            round(x(lost), 1),
            round(y(speed), 1),
            round(LARGEST_RADIUS * math.sqrt(entry.result.file_bytes / largest), 1),
            _title(entry, speed, lost),
            devices.index(entry.device),
        )
        for entry, speed, lost in shown
    ]
    return Plot(
        points,
        [Tick(round(x(value), 1), f"{value:g}") for value in x_steps],
        [Tick(round(y(value), 1), f"{value:g}") for value in y_steps],
        devices,
        [entry.label for entry, speed, lost in known if speed is None or lost is None],
    )


def _title(entry: Entry, speed: float, lost: float) -> str:
    """What a circle says when it is pointed at."""
    size = format_bytes(entry.result.file_bytes)
    return f"{entry.label}, {entry.device}: {speed:.1f} tokens/s, {lost:.3f} nats lost, {size}"


def device_facts(device: DeviceInfo) -> str:
    """One line of the list of devices."""
    memory = format_bytes(device.ram_bytes) if device.ram_bytes else ""
    parts = (device.board, device.cpu, f"{device.cores} cores", memory, device.system, device.machine, device.virtual)
    return ", ".join(part for part in parts if part)


def write_page(path: Path, runs: Sequence[tuple[Run, str]]) -> None:
    """A page of one file, drawn from the runs alone; `runs` are pairs of a run and where its JSON lies."""
    found = entries(runs)
    table = [cells(entry) for entry in found]
    known = [index for index in range(len(COLUMNS)) if any(row[index].order is not None for row in table)]
    template = resources.files("efficientllm.devices").joinpath("collection.html").read_text(encoding="utf-8")
    values = {
        "headline": headline(found),
        "columns": [(COLUMNS[index], COLUMNS[index] in TEXT_COLUMNS) for index in known],
        "rows": [(entry, [row[index] for index in known]) for entry, row in zip(found, table, strict=True)],
        "plot": plot(found),
        "width": WIDTH,
        "height": HEIGHT,
        "margin": MARGIN,
        "sources": [(name, device_facts(run.device), run.measured_at, run.efficientllm_version) for run, name in runs],
    }
    text = Environment(autoescape=True).from_string(template).render(values)
    write_text_atomically(path, text)
