"""Perplexity of every arm as bars."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from efficientllm.train.reporting.plots import GROUP_COLOR, KEPT_COLOR, SOURCE_COLOR, save_figure

from .arms import ARMS
from .result import StudyResult, of_arm


def plot_perplexities(results: Sequence[StudyResult], keep: float, path: Path) -> None:
    """Draw a bar per arm on each text: ours blue, baselines grey; a line spans the seeds."""
    from matplotlib.figure import Figure

    texts = list(results[0].perplexities)
    arms = []
    for name, arm in ARMS.items():
        found = of_arm(results, name, keep)
        if found:
            arms.append((arm, found))
    arms.reverse()
    figure = Figure(figsize=(3.6 * len(texts) + 2.4, 0.34 * len(arms) + 1.1), layout="constrained")
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        for place, (arm, found) in enumerate(arms):
            values = [result.perplexities[text] for result in found]
            color = KEPT_COLOR if arm.is_ours else GROUP_COLOR if arm.same_for_all_ratios else SOURCE_COLOR
            mean = statistics.fmean(values)
            axes.barh(place, mean, color=color, height=0.7)
            axes.plot([min(values), max(values)], [place, place], color="#1b2430", linewidth=1.5)
            # behind the line, which would look like a minus sign
            end = (max(values), place)
            axes.annotate(f"{mean:.1f}", end, xytext=(4, 0), textcoords="offset points", va="center", size=8)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.1)
        axes.set_yticks(range(len(arms)), [f"{arm.title}, {found[0].parameters / 1e6:.2f}M" for arm, found in arms])
        axes.set_xlabel(f"perplexity, {text}")
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
