"""Draw the right requests of models against the bytes of their files, or against the examples of their training.

    python -m research.home.picture docs/results/home.json docs/results/home.png

The JSON file has the `label`, `limits` and `ticks` of the axis across. Each row has a name, the share of right
requests, its place on that axis, or null if it has none, and whether the model is ours. `line` joins rows that name the
same one, and `offset` moves a label, in points.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientllm.train.reporting.plots import KEPT_COLOR, SOURCE_COLOR, save_figure

OTHER_COLOR = "0.35"


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Draw a point for each row, and a line across for a row without a place. The axis across is logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes, lines = figure.subplots(), dict[str, list[tuple[float, float]]]()
    for row in figures["rows"]:
        percent, offset = 100 * row["right"], row.get("offset", (6, -3))
        if row["at"] is None:
            axes.axhline(percent, color=SOURCE_COLOR, linewidth=1)
            place = (figures["limits"][0] * 1.15, percent)
            axes.annotate(row["name"], place, xytext=(0, 3), textcoords="offset points", size=8)
            continue
        axes.plot(row["at"], percent, "o", color=KEPT_COLOR if row["ours"] else OTHER_COLOR)
        axes.annotate(row["name"], (row["at"], percent), xytext=offset, textcoords="offset points", size=8)
        lines.setdefault(row.get("line", ""), []).append((row["at"], percent))
    for points in (points for name, points in lines.items() if name):
        axes.plot(*zip(*points, strict=True), color=KEPT_COLOR, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(*figures["limits"])
    axes.set_xticks([*figures["ticks"].values()], [*figures["ticks"]])
    axes.set_ylim(0, 104)
    axes.set_xlabel(figures["label"])
    axes.set_ylabel("right of the requests, %")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description="Draw right requests against bytes or examples.")
    parser.add_argument("figures", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    draw(json.loads(arguments.figures.read_text(encoding="utf-8")), arguments.picture)


if __name__ == "__main__":
    main()
