"""Fit a power law of quality against tokens through finished runs of one pruning.

gap(T) = A * T^-b. `gap` is the loss on unseen text in nats per token beyond the source (the logarithm of the quality
contract's ratio over all kinds of text), and T the tokens of the run. A fit uses whole runs, because along one run the
learning rate hides a part of the progress. Kaplan et al. (2020, arXiv 2001.08361) found such laws for training from
scratch. For pruned models it is our observation (research/log), and an extrapolation beyond the longest run. Imports no
torch.
"""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...runtime.base.errors import UsageError
from ..model.architecture import Architecture, training_flops
from ..reporting.metrics import read_metrics

SAME_SHARE = 0.02
"""Tolerance of the share of the source's parameters between runs of one law."""
GPU_UTILISATION = 0.4
"""Share of its peak that a GPU reaches in training; 0.3 to 0.5 is common for dense models."""


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


def read_point(folder: str) -> RunPoint:
    """Read the point of a finished run. Raises UsageError if the folder has none, or without measured quality."""
    path = Path(folder)
    try:
        summary = json.loads((path / "model" / "training.json").read_text(encoding="utf-8"))
        shape = json.loads((path / "architecture.json").read_text(encoding="utf-8"))
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--run {folder} is not a finished run of efficientllm-train") from error
    if not summary.get("quality"):
        raise UsageError(f"--run {folder} has no quality beside its source's: it was trained with --no-quality")
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
                f"--run {point.folder} keeps {point.share:.0%} of {point.source_parameters} parameters, "
                f"{first.folder} {first.share:.0%} of {first.source_parameters}: a law is of one pruning of one source"
            )
        if point.gap <= 0:
            raise UsageError(f"--run {point.folder} is no worse than its source: no law is needed")
    if len({point.tokens for point in points}) < 2:
        raise UsageError(f"--run {first.folder}: name runs of at least two lengths; one says nothing about more tokens")
    tokens = [math.log(point.tokens) for point in points]
    slope, intercept = statistics.linear_regression(tokens, [math.log(point.gap) for point in points])
    return TokenLaw(intercept, -slope, tuple(points))
