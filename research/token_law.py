"""Fit and draw a power law of quality against tokens, from runs of one pruning that differ only in length.

gap(T) = A * T^-b. `gap` is the loss on unseen text in nats per token beyond the source, and T the tokens of the run. A
fit uses whole runs, because along one run the learning rate hides a part of the progress. Kaplan et al. (2020, arXiv
2001.08361) found such laws for training from scratch. For pruned models it is our observation (research/log), and an
extrapolation beyond the longest run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efficientllm.runtime.base.errors import UsageError
from efficientllm.train.model.architecture import Architecture
from efficientllm.train.reporting.plots import save_figure

SAME_SHARE = 0.02
"""Tolerance of the share of the source's parameters between runs of one law."""


@dataclass(frozen=True)
class RunPoint:
    """A finished run as a point of the law."""

    name: str
    tokens: int
    parameters: int
    source_parameters: int
    gap: float
    """Nats per token beyond the source."""

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


def training_flops(
    records: list[dict[str, Any]], initial_parameters: int, source: Architecture, with_teacher: bool
) -> float:
    """Return the FLOPs of the steps in a run's metrics. The run started with `initial_parameters`.

    Forward and backward take 6 N per token (Kaplan et al., 2020), and a teacher 2 N more. Attention scores are
    excluded. At 256 tokens they are less than 3 % of a 135M model.
    """
    total, before, parameters = 0.0, 0, initial_parameters
    # an untied table of embeddings is not multiplied
    table = 0 if source.tie_word_embeddings else source.vocab_size * source.hidden_size
    teacher = 2 * (source.num_parameters - table) if with_teacher else 0
    for record in records:
        if "loss" in record:
            tokens, before = record["tokens"] - before, record["tokens"]
            total += tokens * (6 * (parameters - table) + teacher)
            parameters = record["parameters"]  # after the step's removal
    return total


def fit(points: Sequence[RunPoint]) -> TokenLaw:
    """Fit the least-squares line through the logarithms. Raises UsageError if the points do not allow it."""
    points = sorted(points, key=lambda point: point.tokens)
    first = points[0]
    for point in points:
        if abs(point.share - first.share) > SAME_SHARE or point.source_parameters != first.source_parameters:
            raise UsageError(
                f"{point.name} keeps {point.share:.0%} of {point.source_parameters} parameters, "
                f"{first.name} {first.share:.0%} of {first.source_parameters}: a law is of one pruning of one source"
            )
        if point.gap <= 0:
            raise UsageError(f"{point.name} is no worse than its source: no law is needed")
    if len({point.tokens for point in points}) < 2:
        raise UsageError(f"{first.name}: name runs of at least two lengths; one says nothing about more tokens")
    tokens = [math.log(point.tokens) for point in points]
    slope, intercept = statistics.linear_regression(tokens, [math.log(point.gap) for point in points])
    return TokenLaw(intercept, -slope, tuple(points))


def draw_laws(laws: Mapping[str, TokenLaw], later: Mapping[str, dict[int, float]], end: float, path: Path) -> None:
    """Draw gap against tokens: runs, laws up to `end` tokens with their bands, and later runs as circles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, law) in enumerate(laws.items()):
        tokens = np.geomspace(law.points[0].tokens, end)
        axes.plot(tokens, [law.gap(each) for each in tokens], color=f"C{number}", linewidth=1, label=name)
        bands = [law.band(each) or (law.gap(each), law.gap(each)) for each in tokens]
        lowest, highest = zip(*bands, strict=True)
        axes.fill_between(tokens, lowest, highest, color=f"C{number}", alpha=0.15, linewidth=0)
        axes.plot([point.tokens for point in law.points], [point.gap for point in law.points], "o", color=f"C{number}")
        axes.plot([*later[name]], [*later[name].values()], "o", color=f"C{number}", fillstyle="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens of the run")
    axes.set_ylabel("gap to the source, nats per token\non six kinds of untrained text")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks(sorted({end, *(point.tokens for law in laws.values() for point in law.points)}))
    axes.xaxis.minorticks_off()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), fontsize="small")
    save_figure(figure, path)
