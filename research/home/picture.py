"""Draw the right requests of models in a real Home Assistant against the bytes of their files.

    python -m research.home.picture docs/results/home.json docs/results/home.png

Each row of the JSON file has a name, the share of right requests, whether the model is ours, and the bytes of its file,
or null if the file is not known. `offset` moves its label, in points.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficientllm.train.reporting.plots import KEPT_COLOR, SOURCE_COLOR, save_figure

OTHER_COLOR = "0.35"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a point for each file, and a line for what has no file. The axis of bytes is logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        percent = 100 * row["right"]
        if row["bytes"] is None:
            axes.axhline(percent, color=SOURCE_COLOR, linewidth=1)
            axes.annotate(row["name"], (8e6, percent), xytext=(0, 3), textcoords="offset points", size=8)
            continue
        color = KEPT_COLOR if row["ours"] else OTHER_COLOR
        axes.plot(row["bytes"], percent, "o", color=color)
        offset = row.get("offset", (6, -3))
        axes.annotate(row["name"], (row["bytes"], percent), xytext=offset, textcoords="offset points", size=8)
    axes.set_xscale("log")
    axes.set_xlim(7e6, 3e10)
    axes.set_xticks([1e7, 1e8, 1e9, 1e10], ["10 MB", "100 MB", "1 GB", "10 GB"])
    axes.set_ylim(0, 104)
    axes.set_xlabel("bytes of the file")
    axes.set_ylabel("right of the requests, %")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description="Draw right requests in Home Assistant against bytes.")
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    draw(json.loads(arguments.rows.read_text(encoding="utf-8"))["rows"], arguments.picture)


if __name__ == "__main__":
    main()
