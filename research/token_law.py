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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.base.quantities import format_count, format_duration, markdown_table
from efficientllm.train.model.architecture import Architecture, matmul_parameters
from efficientllm.train.reporting.plots import save_figure

GPU_UTILISATION = 0.4
"""Share of its peak that a GPU reaches in training; 0.3 to 0.5 is common for dense models."""
SAME_SHARE = 0.02
"""Tolerance of the share of the source's parameters between runs of one law."""
FURTHEST = 1000
"""Largest multiple of the longest run with a prediction."""


@dataclass(frozen=True)
class LawOptions:
    """Law."""

    within: float = flags.number(1.1, above=1)
    """Perplexity to reach, as a multiple of the source's."""
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

    @classmethod
    def of_study(cls, row: Mapping[str, Any]) -> RunPoint:
        """Return a run of research/study, which is one of several seeds, as a point without an error of its own."""
        sizes, speed = (row["parameters"], row["source_parameters"]), row["seconds"] / row["tokens"]
        return cls(row["arm"], row["tokens"], *sizes, row["gap"], 0.0, speed)

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

    @property
    def formula(self) -> str:
        return f"{math.exp(self.log_scale):.3g} * tokens ^ -{self.exponent:.3f}"

    def band(self, tokens: float) -> tuple[float, float] | None:
        """Return the gap of one further run with 95 % probability, lowest and highest; None with two runs."""
        freedom = len(self.points) - 2
        if not freedom:
            return None
        from scipy.stats import t

        logs = [math.log(point.tokens) for point in self.points]
        errors = [math.log(point.gap / self.gap(point.tokens)) for point in self.points]
        mean = statistics.fmean(logs)
        distance = (math.log(tokens) - mean) ** 2 / sum((each - mean) ** 2 for each in logs)
        variance = sum(error**2 for error in errors) / freedom * (1 + 1 / len(logs) + distance)
        factor = math.exp(float(t.ppf(0.975, freedom)) * math.sqrt(variance))
        return self.gap(tokens) / factor, self.gap(tokens) * factor

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
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is not a finished run of efficientllm-train") from error
    if not summary.get("quality"):
        raise UsageError(f"{folder} has no quality beside its source's: it was trained with --no-quality")
    every, tokens = summary["quality"]["texts"]["all texts"], summary["tokens"]
    return RunPoint(
        folder,
        tokens,
        summary["parameters"],
        summary["source_parameters"],
        math.log(every["ratio"]),
        every["ratio_stderr"] / every["ratio"],
        summary["seconds"] / tokens,
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


def law_lines(law: TokenLaw, within: float) -> list[str]:
    """Return lines on the runs, the law, and the tokens for a perplexity of `within` times the source's."""
    last = law.points[-1]
    rows = [["run", "tokens", "parameters", "perplexity / source", "by the law"]]
    for point in law.points:
        measured = f"x{math.exp(point.gap):.3f} ± {math.exp(point.gap) * point.gap_error:.3f}"
        expected = f"x{math.exp(law.gap(point.tokens)):.3f}"
        size = f"{format_count(point.parameters)} ({point.share:.0%})"
        rows.append([point.folder, format_count(point.tokens), size, measured, expected])
    formula = f"gap = {law.formula} nats per token"
    return [markdown_table(rows), "", formula, _answer(law, within, last.seconds_per_token)]


def _answer(law: TokenLaw, within: float, seconds_per_token: float) -> str:
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
    if tokens > last.tokens:
        answer += f"; {tokens / last.tokens:.0f} times the longest run: an extrapolation"
    return answer


def draw_laws(laws: Mapping[str, TokenLaw], end: float, path: Path, within: float | None = None) -> None:
    """Draw gap against tokens on logarithmic axes: runs, laws up to `end` tokens with their bands, and a target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, law) in enumerate(laws.items()):
        tokens = np.geomspace(law.points[0].tokens, end)
        axes.plot(tokens, [law.gap(each) for each in tokens], color=f"C{number}", linewidth=1, label=name)
        bands = [law.band(each) or (law.gap(each), law.gap(each)) for each in tokens]
        lowest, highest = zip(*bands, strict=True)
        axes.fill_between(tokens, lowest, highest, color=f"C{number}", alpha=0.15, linewidth=0)
        gaps, errors = zip(*((point.gap, point.gap_error) for point in law.points), strict=True)
        axes.errorbar([point.tokens for point in law.points], gaps, yerr=errors, fmt="o", color=f"C{number}")
    if within is not None:
        axes.axhline(math.log(within), color="C7", linewidth=1, label=f"{within:g} times the source's perplexity")
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
    print("\n".join(law_lines(law, options.within)))
    if options.picture:
        last, wanted = law.points[-1].tokens, law.tokens(math.log(options.within))
        end = min(max(last, wanted) * 1.5, FURTHEST * last)
        draw_laws({"law": law}, end, Path(options.picture), options.within)
        print(f"\npicture: {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
