"""Fit, describe and draw a power law of quality against tokens: `python -m research.token_law RUN RUN ...`.

The runs are of one pruning and differ only in length.

gap(T) = A * T^-b. `gap` is the loss on unseen text in nats per token beyond the source (the logarithm of the quality
contract's ratio over all kinds of text), and T the tokens of the run. A fit uses whole runs, because along one run the
learning rate hides a part of the progress. Kaplan et al. (2020, arXiv 2001.08361) found such laws for training from
scratch. For pruned models it is our observation (research/log), and an extrapolation beyond the longest run.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.base.quantities import format_count, format_duration, markdown_table
from efficientllm.train.model.architecture import Architecture, matmul_parameters
from efficientllm.train.planning.gpus import GPU_UTILISATION
from efficientllm.train.reporting.metrics import read_metrics
from efficientllm.train.reporting.plots import save_figure

SAME_SHARE = 0.02
"""Tolerance of the share of the source's parameters between runs of one law."""
MEASURED, WANTED = "#2f6db3", "#e08a3c"
FURTHEST = 1000
"""Largest multiple of the longest run with a prediction."""


@dataclass(frozen=True)
class LawOptions:
    """Law."""

    within: float = flags.number(1.1, above=1)
    """Perplexity to reach, as a multiple of the source's."""
    tflops: float = flags.number(0.0, at_least=0)
    """Peak of a GPU in TFLOP/s, to predict its hours."""
    picture: str = ""
    """PNG file to write with the law."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


@dataclass(frozen=True)
class RunPoint:
    """A finished run as a point of the law."""

    folder: str
    tokens: int
    parameters: int
    source_parameters: int
    gap: float
    """Nats per token beyond the source."""
    gap_error: float
    """Standard error of the gap over documents."""
    seconds_per_token: float
    flops_per_token: float

    @property
    def share(self) -> float:
        """Return the remaining share of the source's parameters."""
        return self.parameters / self.source_parameters


@dataclass(frozen=True)
class TokenLaw:
    """gap = exp(log_scale) * tokens ** -exponent."""

    log_scale: float
    exponent: float
    points: tuple[RunPoint, ...]
    """Points, shortest run first."""

    def gap(self, tokens: float) -> float:
        """Return the expected gap in nats per token."""
        return math.exp(self.log_scale - self.exponent * math.log(tokens))

    def tokens(self, gap: float) -> float:
        """Return the tokens for an expected gap; infinite if more tokens do not help."""
        if self.exponent <= 0:
            return math.inf
        return math.exp(min(700.0, (self.log_scale - math.log(gap)) / self.exponent))


def training_flops(
    records: list[dict[str, Any]], initial_parameters: int, source: Architecture, with_teacher: bool
) -> float:
    """Return the FLOPs of the steps in a run's metrics. The run started with `initial_parameters`.

    Forward and backward take 6 N per token (Kaplan et al., 2020), and a teacher 2 N more. Attention scores are
    excluded. At 256 tokens they are less than 3 % of a 135M model.
    """
    total, before, parameters = 0.0, 0, initial_parameters
    teacher = 2 * matmul_parameters(source, source.num_parameters) if with_teacher else 0
    for record in records:
        if "loss" in record:
            tokens, before = record["tokens"] - before, record["tokens"]
            total += tokens * (6 * matmul_parameters(source, parameters) + teacher)
            parameters = record["parameters"]  # after the step's removal
    return total


def read_point(folder: str) -> RunPoint:
    """Read the point of a finished run. Raises UsageError if the folder has none, or without measured quality."""
    path = Path(folder)
    try:
        summary = json.loads((path / "model" / "training.json").read_text(encoding="utf-8"))
        shape = json.loads((path / "architecture.json").read_text(encoding="utf-8"))
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is not a finished run of efficientllm-train") from error
    if not summary.get("quality"):
        raise UsageError(f"{folder} has no quality beside its source's: it was trained with --no-quality")
    every, tokens = summary["quality"]["texts"]["all texts"], summary["tokens"]
    source = Architecture.from_dict(shape["source"])
    flops = training_flops(read_metrics(path), source.num_parameters, source, config["optimizer"]["distill"] > 0)
    return RunPoint(
        folder,
        tokens,
        summary["parameters"],
        summary["source_parameters"],
        math.log(every["ratio"]),
        every["ratio_stderr"] / every["ratio"],
        summary["seconds"] / tokens,
        flops / tokens,
    )


def fit(points: Sequence[RunPoint]) -> TokenLaw:
    """Fit the least-squares line through the logarithms. Raises UsageError if the points do not allow it."""
    points = sorted(points, key=lambda point: point.tokens)
    first = points[0]
    for point in points:
        if abs(point.share - first.share) > SAME_SHARE or point.source_parameters != first.source_parameters:
            raise UsageError(
                f"{point.folder} keeps {point.share:.0%} of {point.source_parameters} parameters, "
                f"{first.folder} {first.share:.0%} of {first.source_parameters}: a law is of one pruning of one source"
            )
        if point.gap <= 0:
            raise UsageError(f"{point.folder} is no worse than its source: no law is needed")
    if len({point.tokens for point in points}) < 2:
        raise UsageError(f"{first.folder}: name runs of at least two lengths; one says nothing about more tokens")
    tokens = [math.log(point.tokens) for point in points]
    slope, intercept = statistics.linear_regression(tokens, [math.log(point.gap) for point in points])
    return TokenLaw(intercept, -slope, tuple(points))


def law_lines(law: TokenLaw, within: float, tflops: float) -> list[str]:
    """Return lines on the runs, the law, and the tokens for a perplexity of `within` times the source's."""
    last = law.points[-1]
    rows = [["run", "tokens", "parameters", "perplexity / source", "by the law"]]
    for point in law.points:
        measured = f"x{math.exp(point.gap):.3f} ± {math.exp(point.gap) * point.gap_error:.3f}"
        expected = f"x{math.exp(law.gap(point.tokens)):.3f}"
        size = f"{format_count(point.parameters)} ({point.share:.0%})"
        rows.append([point.folder, format_count(point.tokens), size, measured, expected])
    formula = f"gap = {math.exp(law.log_scale):.3g} * tokens ^ -{law.exponent:.3f} nats per token"
    return [markdown_table(rows), "", formula, _answer(law, within, tflops, last.seconds_per_token)]


def _answer(law: TokenLaw, within: float, tflops: float, seconds_per_token: float) -> str:
    last = law.points[-1]
    tokens = law.tokens(math.log(within))
    if tokens > FURTHEST * last.tokens:
        reached = f"x{math.exp(law.gap(FURTHEST * last.tokens)):.3f}"
        return (
            f"x{within:g} is more than {FURTHEST} times the longest run away, where this law says nothing "
            f"({format_count(FURTHEST * last.tokens)} tokens would give {reached})"
        )
    answer = f"x{within:g}: about {format_count(round(tokens))} tokens, {format_duration(tokens * seconds_per_token)} "
    answer += "on the machine of the longest run"
    if tflops:
        seconds = tokens * last.flops_per_token / (tflops * 1e12 * GPU_UTILISATION)
        answer += f", {format_duration(seconds)} on a GPU of {tflops:g} TFLOP/s at {GPU_UTILISATION:.0%} of its peak"
    if tokens > last.tokens:
        answer += f"; {tokens / last.tokens:.0f} times the longest run: an extrapolation"
    return answer


def draw_law(law: TokenLaw, within: float, path: Path) -> None:
    """Draw gap against tokens on logarithmic axes: the runs with their errors, the law, and the target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    first, last = law.points[0].tokens, law.points[-1].tokens
    wanted = math.log(within)
    end = min(max(last, law.tokens(wanted)) * 1.5, FURTHEST * last)
    axes.plot([first, last], [law.gap(first), law.gap(last)], color=MEASURED, linewidth=1, label="law")
    axes.plot([last, end], [law.gap(last), law.gap(end)], "--", color=MEASURED, linewidth=1, label="extrapolated")
    axes.errorbar(
        [point.tokens for point in law.points],
        [point.gap for point in law.points],
        yerr=[point.gap_error for point in law.points],
        fmt="o",
        color=MEASURED,
        label="runs",
    )
    axes.axhline(wanted, color=WANTED, linewidth=1, label=f"{within:g} times the source's perplexity")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens of the run")
    axes.set_ylabel("gap to the source, nats per token\non six kinds of untrained text")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def body(argv: Sequence[str]) -> int:
    """Print the law, and draw it if requested."""
    parser = flags.Parser(LawOptions, prog="python -m research.token_law", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished run of efficientllm-train")
    arguments = parser.parse(argv)
    law, options = fit([read_point(folder) for folder in arguments.pop("runs")]), flags.take(arguments, LawOptions)
    print("\n".join(law_lines(law, options.within, options.tflops)))
    if options.picture:
        draw_law(law, options.within, Path(options.picture))
        print(f"\npicture: {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
