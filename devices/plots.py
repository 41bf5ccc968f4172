"""The plots of the benchmark's page, as SVG text."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter

from .results import Result, Run, mean_context

WIDTH_INCHES = 9.0
STYLES = cycler(marker=["o", "s", "^", "D", "v"]) * cycler(color=matplotlib.color_sequences["tab10"])
"""Of fifty artefacts before one repeats: all colours with one marker, then with the next."""


def _labeled(runs: Sequence[Run]) -> list[tuple[str, Result]]:
    """Every result with a name that tells artefacts and runs apart, and an emulator's figures from a device's."""
    return [
        (name + (f" (run {number})" if len(runs) > 1 else "") + (", EMULATED" if run.device.emulated else ""), result)
        for number, run in enumerate(runs, 1)
        for name, result in zip(run.labels, run.results, strict=True)
    ]


def _svg(canvas: Canvas) -> str:
    stream = io.StringIO()
    canvas.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def _axes(height: float) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(WIDTH_INCHES, height))
    axes = canvas.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_prop_cycle(STYLES)
    return canvas, axes


def _first_decode(result: Result) -> str | None:
    return next((test for test in result.speeds if re.fullmatch(r"tg\d+", test)), None)


def speed_against_size(runs: Sequence[Run]) -> str:
    """Scatter of the first decode test's median with its quartiles; "" where nothing was decoded."""
    canvas, axes = _axes(4.5)
    tests = set()
    for label, result in _labeled(runs):
        test = _first_decode(result)
        if test is None:
            continue
        tests.add(test)
        figure = result.speeds[test]
        spread = [[figure.median - figure.low], [figure.high - figure.median]]
        axes.errorbar(result.file_bytes / 1e6, figure.median, yerr=spread, linestyle="none", capsize=3, label=label)
    if not tests:
        return ""
    axes.set_xlabel("file size, MB")
    axes.set_ylabel(f"decode ({', '.join(sorted(tests))}), tokens/s")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _svg(canvas)


def latency_against_context(runs: Sequence[Run]) -> str:
    """Milliseconds per decoded token at every depth that was measured; "" where there is one depth only."""
    canvas, axes = _axes(4.0)
    drawn = False
    for label, result in _labeled(runs):
        points = []
        for test, figure in result.speeds.items():
            context = mean_context(test)
            if context is not None:
                points.append((context, 1000 / figure.median, 1000 / figure.high, 1000 / figure.low))
        if len(points) < 2:
            continue
        points.sort()
        x, y, low, high = zip(*points, strict=True)
        (line,) = axes.plot(x, y, label=label)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        drawn = True
    if not drawn:
        return ""
    axes.set_xlabel("tokens before it (mean)")
    axes.set_ylabel("ms per token")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _svg(canvas)


def memory_bars(runs: Sequence[Run]) -> str:
    """Peak RSS, with the part that Python and its libraries took before the model was loaded; "" without any."""
    results = [(label, result) for label, result in _labeled(runs) if result.peak_rss_bytes]
    if not results:
        return ""
    canvas, axes = _axes(0.6 + 0.4 * len(results))
    labels = [label for label, _ in results][::-1]
    base = [result.baseline_rss_bytes / 1e6 for _, result in results][::-1]
    peak = [result.peak_rss_bytes / 1e6 for _, result in results][::-1]
    axes.barh(labels, base, color="#b8b8b8", label="Python and libraries")
    axes.barh(labels, [high - low for high, low in zip(peak, base, strict=True)], left=base, label="model and its work")
    for index, value in enumerate(peak):
        axes.text(value, index, f" {value:.0f}", va="center", fontsize=8)
    axes.set_xlabel("peak RSS, MB")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return _svg(canvas)
