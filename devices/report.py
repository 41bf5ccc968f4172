"""Benchmark results for people: tables for the terminal and for documents, and a page with plots.

Results of many devices and artefacts as one page: a headline, a table that sorts, speed against quality and size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from ..runtime.base.extras import extra
from ..runtime.base.files import write_text_atomically
from ..runtime.base.quantities import Figure, format_bytes, format_count, markdown_table
from .results import DeviceInfo, Result, Run


def _figure(figure: Figure | None) -> str:
    return "-" if figure is None else figure.describe(figure.digits)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def device_line(device: DeviceInfo, threads: int) -> str:
    """The device in one line; figures of an emulator are called that."""
    known = f" ({device.known['soc']}, {device.known['cores']}, {device.known['ram']})" if device.known else ""
    parts = [device.board + known, device.cpu, f"{device.cores} cores"]
    parts += [format_bytes(device.ram_bytes) if device.ram_bytes else "", device.system, device.machine]
    count = "all threads" if threads == 0 else "1 thread" if threads == 1 else f"{threads} threads"
    text = f"{device.name}: {', '.join(part for part in parts if part)}; {count}"
    if device.emulated:
        return f"EMULATED ({device.virtual or 'unknown'}), no figure here is the device's. {text}"
    return f"{text}; {device.virtual}" if device.virtual else text


def perplexity_line(results: Sequence[Result]) -> str | None:
    """Held-out perplexities of the one trained model among the results, None where there is none."""
    for result in results:
        training = result.manifest.get("training") or {}
        values = training.get("perplexity")
        if values:
            stages = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in values.items())
            return (
                f"held-out perplexity ({training['held_out_tokens']:,} tokens): {stages}; "
                f"trained on {training['tokens']:,} tokens in {training['seconds']:.0f} s"
            )
    return None


def notes(run: Run) -> list[str]:
    """What a reader of the table must know."""
    lines = [device_line(run.device, run.options.threads), *origin_lines(run), *ratio_lines(run)]
    for name, result in zip(run.labels, run.results, strict=True):
        if result.engine_settings:
            lines.append(f"{name}: {result.engine_settings}")
        if result.spread_of_processes:
            spreads = ", ".join(f"{test} {100 * share:.0f} %" for test, share in result.spread_of_processes.items())
            lines.append(f"{name}: processes differ by {spreads}")
        if result.throttled:
            lines.append(f"{name}: THROTTLED, {result.throttled}; cool the device or use --max-temp")
        if result.temperature_celsius:
            lines.append(f"{name}: {result.temperature_celsius[0]:.1f} to {result.temperature_celsius[1]:.1f} C")
        if result.clock_mhz:
            lines.append(f"{name}: cores at {result.clock_mhz[0]:.0f} to {result.clock_mhz[1]:.0f} MHz")
        lines += [f"{name}: {test} left out: {reason}" for test, reason in result.skipped.items()]
    line = perplexity_line(run.results)
    return [*lines, line] if line else lines


def origin_lines(run: Run) -> list[str]:
    """When and with what versions the figures were made, as far as the run tells."""
    engines = dict.fromkeys(result.engine_version for result in run.results if result.engine_version)
    ours = f"efficientllm {run.efficientllm_version}" if run.efficientllm_version else ""
    ours += f" at commit {run.efficientllm_commit}" if run.efficientllm_commit else ""
    found = ", ".join(part for part in (run.measured_at, ours, *engines) if part)
    return [f"measured: {found}"] if found else []


def ratio_lines(run: Run) -> list[str]:
    """Every further artefact as multiples of the first: its bytes, and how much faster it does each test."""
    if not run.results:
        return []
    (first, *others), (name, *names) = run.results, run.labels
    lines = []
    for label, result in zip(names, others, strict=True):
        tests = [test for test in tests_of([run]) if test in first.speeds and test in result.speeds]
        speeds = [f"{test} x{result.speeds[test].median / first.speeds[test].median:.2f}" for test in tests]
        share = f"{result.file_bytes / first.file_bytes:.2f} of the bytes"
        lines.append(f"{label} against {name}: {', '.join([share, *speeds])}")
    return lines


def tests_of(runs: Sequence[Run]) -> list[str]:
    """Names of the tests, prefill first, in the order they were run."""
    names = dict.fromkeys(test for run in runs for result in run.results for test in result.speeds)
    return sorted(names, key=lambda name: name.startswith("tg"))


def _main_tests(run: Run) -> list[str]:
    """The first prefill and the shortest decode."""
    return [f"pp{run.options.prompt_tokens[0]}", f"tg{min(run.options.decode_tokens)}"]


def rows(run: Run) -> list[list[str]]:
    """Header and one row per artefact; speeds in tokens per second as median (first-third quartile).

    CPU time is that of all threads per token, in milliseconds.
    """
    tests = tests_of([run])
    timed = [test for test in _main_tests(run) if any(test in result.cpu_ms_per_token for result in run.results)]
    energy = any(result.joules_per_token for result in run.results)
    artefact = "artefact, EMULATED" if run.device.emulated else "artefact"
    header = [artefact, "parameters", "quant", "on disk", *(f"{test} t/s" for test in tests)]
    header += [f"{test} CPU ms" for test in timed]
    decode = f"tg{min(run.options.decode_tokens)}"
    limits = any(result.memory_bytes_per_second for result in run.results)
    header += [f"{decode} of bandwidth"] if limits else []
    table = [[*header, "first token ms", "load ms", "peak RSS", "KV cache", *(["J/token"] if energy else [])]]
    for name, result in zip(run.labels, run.results, strict=True):
        table.append(
            [
                name,
                format_count(result.num_parameters) if result.num_parameters else "?",
                result.quantization or "?",
                format_bytes(result.file_bytes),
                *(_figure(result.speeds.get(test)) for test in tests),
                *(_figure(result.cpu_ms_per_token.get(test)) for test in timed),
                *([_share(result.share_of_bandwidth(decode))] if limits else []),
                _figure(result.time_to_first_token_ms),
                _figure(result.load_ms),
                format_bytes(result.peak_rss_bytes),
                format_bytes(result.kv_cache_bytes) if result.kv_cache_bytes else "?",
                *([_figure(result.joules_per_token)] if energy else []),
            ]
        )
    return table


def print_rows(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> None:
    """A table for the terminal, header first, of at least 100 characters; columns not in `left` end right."""
    header, *body = rows
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index in left else "right", overflow="fold")
    for row in body:
        table.add_row(*row)
    Console(width=max(Console().width, 100), markup=False).print(table)


def print_table(run: Run) -> None:
    """One line per figure and one column per artefact: there are more figures than artefacts, terminals are narrow."""
    print_rows(list(zip(*rows(run), strict=True)))
    for line in notes(run):
        print(line)


def markdown(run: Run) -> str:
    return f"{markdown_table(rows(run))}\n\n" + "\n".join(f"- {line}" for line in notes(run)) + "\n"


def require_plots() -> None:
    """MissingExtraError where the page's plots cannot be drawn."""
    with extra("bench"):
        import matplotlib  # noqa: F401


def _narrow(table: list[list[str]]) -> list[tuple[str, ...]]:
    """The table, turned where that makes it narrower: a column per artefact as in the terminal, else one per figure."""
    return list(zip(*table, strict=True)) if len(table) < len(table[0]) else [tuple(row) for row in table]


def write_html(path: Path, runs: Sequence[Run]) -> None:
    """A page of one file: no script, no font and no picture from anywhere else."""
    require_plots()
    from . import plots

    template = resources.files("efficientllm.devices").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True)
    sections = [{"device": run.device, "notes": notes(run), "rows": _narrow(rows(run))} for run in runs]
    figures = [
        ("Decode speed against file size", plots.speed_against_size(runs)),
        ("Latency of a token against the context before it", plots.latency_against_context(runs)),
        ("Peak memory", plots.memory_bars(runs)),
    ]
    write_text_atomically(path, environment.from_string(template).render(sections=sections, figures=figures))


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


def _figure_cell(figure: Figure | None) -> Cell:
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
        _figure_cell(entry.speed("tg")),
        _figure_cell(entry.speed("pp")),
        _bytes(result.file_bytes),
        _bytes(result.peak_rss_bytes),
        _number(entry.mean_kl, 4),
        _number(entry.nats_lost, 3),
        _figure_cell(result.joules_per_token),
        _figure_cell(result.time_to_first_token_ms),
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
