"""The results page: a headline, a sortable table of all artefacts and devices, and each run."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from ..runtime.base.files import write_text_atomically
from ..runtime.base.quantities import Figure, format_bytes, format_count
from . import run_table
from .results import Result, Run

NamedRun = tuple[Run, Path | None]
"""A run and its JSON file, if it was written."""


@dataclass(frozen=True)
class Entry:
    """One artefact on one device."""

    label: str
    result: Result
    run: Run
    json_path: Path | None

    @property
    def device(self) -> str:
        """Return the board or processor. The value of --device is often "local" and identifies nothing."""
        device = self.run.device
        name = device.board or device.cpu or device.name
        return f"EMULATED {name}" if device.emulated else name

    @property
    def mean_kl(self) -> float | None:
        """Return the KL from the exact file in nats per token, as the export measured it, and None if unknown."""
        stages = ("quantized", "exact")
        values = (_number_at(self.result.manifest, "verification", stage, "mean_kl") for stage in stages)
        return next((value for value in values if value is not None), None)

    @property
    def perplexity_ratio(self) -> float | None:
        """Return the checkpoint's perplexity relative to its source's, on text it was not trained on.

        An untrained checkpoint has 1. Returns None if the ratio is unknown.
        """
        if not self.result.manifest.get("training"):
            return 1.0
        return _number_at(self.result.manifest, "training", "quality", "texts", "all texts", "ratio") or None

    @property
    def nats_lost(self) -> float | None:
        """Return the nats per token lost from the source to the file, and None if a part of them is unknown."""
        ratio, kl = self.perplexity_ratio, self.mean_kl
        return None if ratio is None or kl is None else math.log(ratio) + kl

    def speed(self, kind: str) -> Figure | None:
        """Return the figure of the first test of `kind` ("pp" or "tg") without a context before it."""
        names = (name for name in self.result.speeds if name.startswith(kind) and "@" not in name)
        name = next(names, None)
        return self.result.speeds[name] if name else None

    @property
    def decode_median(self) -> float:
        """Return the median decode speed in tokens per second, and 0 if none was measured."""
        figure = self.speed("tg")
        return figure.median if figure else 0.0

    @property
    def threads(self) -> int:
        """Return the threads that the measuring process reported, or those of the options."""
        return self.result.threads or self.run.options.threads


def _number_at(values: Any, *keys: str) -> float | None:
    """Return a non-negative number nested in a manifest, and None for any other content."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    is_number = isinstance(values, int | float) and math.isfinite(values) and values >= 0
    return float(values) if is_number else None


def entries(runs: Sequence[NamedRun]) -> list[Entry]:
    """Return all results of the runs. Equal labels on one device are distinguished by the number of the run."""
    found: list[tuple[int, Entry]] = []
    for number, (run, json_path) in enumerate(runs, 1):
        for label, result in run.labelled:
            found.append((number, Entry(label, result, run, json_path)))
    counts = Counter((entry.label, entry.device) for _, entry in found)
    distinct: list[Entry] = []
    for number, entry in found:
        is_ambiguous = counts[entry.label, entry.device] > 1
        distinct.append(replace(entry, label=f"{entry.label} (run {number})") if is_ambiguous else entry)
    return distinct


@dataclass(frozen=True)
class Cell:
    """A cell of the table."""

    text: str
    order: float | str | None = None
    """Value to sort by. Cells with None come last."""
    spread: str = ""
    """Quartiles, shown in small print."""


def _number_cell(value: float | None, digits: int) -> Cell:
    return Cell("-" if value is None else f"{value:.{digits}f}", value)


def _figure_cell(figure: Figure | None) -> Cell:
    if figure is None:
        return Cell("-")
    digits = figure.digits
    spread = f"{figure.low:.{digits}f}-{figure.high:.{digits}f}" if figure.n > 1 else ""
    return Cell(f"{figure.median:.{digits}f}", figure.median, spread)


def _bytes_cell(count: int) -> Cell:
    return Cell(format_bytes(count), count) if count else Cell("-")


def _text_cell(text: str) -> Cell:
    return Cell(text or "-", text or None)


def _job_cell(manifest: dict[str, Any]) -> Cell:
    """Return the scores of jobs in a manifest, one for each job and metric: the last, which is of the file itself."""
    scores: dict[str, float] = {}
    jobs = manifest.get("jobs")
    for each in jobs if isinstance(jobs, list | tuple) else ():
        name = str(each.get("score")) if isinstance(each, dict) else ""
        mean = _number_at(each, "values", name, "mean")
        if mean is not None:
            scores[f"{each.get('task')}, {name}"] = mean
    text = "; ".join(f"{mean:.3f} ({name})" for name, mean in scores.items())
    return Cell(text or "-", next(iter(scores.values()), None))


TITLE = b"<title>efficientllm: results</title>"
"""Marks a page of this module."""
TEXT_COLUMNS = ("artefact", "device", "type", "engine", "measured", "remarks")


def cells(entry: Entry) -> dict[str, Cell]:
    """Return one row of the table by column."""
    result, run = entry.result, entry.run
    parameters = result.num_parameters
    throttled = f"THROTTLED: {result.throttled}" if result.throttled else ""
    return {
        "artefact": _text_cell(entry.label),
        "device": _text_cell(entry.device),
        "decode t/s": _figure_cell(entry.speed("tg")),
        "prefill t/s": _figure_cell(entry.speed("pp")),
        "on disk": _bytes_cell(result.file_bytes),
        "peak memory": _bytes_cell(result.peak_rss_bytes),
        "mean KL": _number_cell(entry.mean_kl, 4),
        "nats lost": _number_cell(entry.nats_lost, 3),
        "job": _job_cell(result.manifest),
        "J/token": _figure_cell(result.joules_per_token),
        "first token ms": _figure_cell(result.time_to_first_token_ms),
        "parameters": Cell(format_count(parameters), parameters) if parameters else Cell("-"),
        "type": _text_cell(result.quantization),
        "threads": Cell(str(entry.threads) if entry.threads else "all", entry.threads or math.inf),
        "engine": _text_cell(result.engine_version or result.engine),
        "measured": Cell(run.measured_at[:10] or "-", run.measured_at or None),
        "remarks": _text_cell("; ".join(filter(None, [throttled, run.device.virtual]))),
    }


def headline(found: Sequence[Entry]) -> str:
    """Return a sentence on the fastest decode of a real device, and on the slowest of the same device."""
    real = [entry for entry in found if not entry.run.device.emulated and entry.speed("tg")]
    if not real:
        return "No decode speed of a real device."
    fastest = max(real, key=lambda entry: entry.decode_median)
    slowest = min((entry for entry in real if entry.device == fastest.device), key=lambda entry: entry.decode_median)
    size, speed = fastest.result.file_bytes, fastest.decode_median
    text = f"{fastest.label} decodes {speed:.0f} tokens a second on {fastest.device}, {format_bytes(size)}"
    if slowest is not fastest:
        text += f": {speed / slowest.decode_median:.2f} times as fast as {slowest.label}"
        text += f", at {size / slowest.result.file_bytes:.2f} of its bytes"
    return f"{text}.{_quality_sentence(fastest)}"


def _quality_sentence(entry: Entry) -> str:
    """Return a sentence on the lost quality, and "" if the manifest contains none."""
    ratio, kl = entry.perplexity_ratio, entry.mean_kl
    losses = []
    if ratio and entry.result.manifest.get("training"):
        losses.append(f"its checkpoint has {ratio:.2f} times the perplexity of its source")
    if kl is not None:
        losses.append(f"the file has a mean KL of {kl:.2g} from its checkpoint")
    return f" The cost: {' and '.join(losses)}." if losses else ""


def is_page(path: Path) -> bool:
    """Return whether `write_page` wrote the file."""
    with path.open("rb") as file:
        return TITLE in file.read(1000)


def write_page(path: Path, runs: Sequence[NamedRun]) -> None:
    """Write one self-contained HTML file, without external scripts, fonts or images."""

    def link(json_path: Path | None) -> str:
        return Path(os.path.relpath(json_path, path.absolute().parent)).as_posix() if json_path else ""

    found = entries(runs)
    table = [cells(entry) for entry in found]
    columns: list[str] = []
    if table:
        columns = [name for name in table[0] if any(row[name].order is not None for row in table)]
    rows = []
    for entry, row in zip(found, table, strict=True):
        rows.append((link(entry.json_path), [row[name] for name in columns]))
    values = {
        "headline": headline(found),
        "columns": [(name, name in TEXT_COLUMNS) for name in columns],
        "rows": rows,
        "runs": [(link(json_path), _narrow(run_table.rows(run)), run_table.notes(run)) for run, json_path in runs],
    }
    template = resources.files("efficientllm.devices").joinpath("report_page.html").read_text(encoding="utf-8")
    write_text_atomically(path, Environment(autoescape=True).from_string(template).render(values))


def _narrow(table: list[list[str]]) -> list[tuple[str, ...]]:
    """Return the table, transposed if that makes it narrower."""
    is_wide = len(table) < len(table[0])
    return list(zip(*table, strict=True)) if is_wide else [tuple(row) for row in table]
