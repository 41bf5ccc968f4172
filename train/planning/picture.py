"""Where the milliseconds of a workload go, before and after."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from ...runtime.base.files import write_bytes_atomically
from ..model.architecture import Architecture
from ..pruning.measures import DeviceTime
from .report import PARTS, parts_ms

COLORS = ("#e08a3c", "#2f6db3", "#4f9d69", "#d5dae3")


def draw(rows: Sequence[tuple[str, DeviceTime, Architecture]], path: Path) -> None:
    """One stacked bar a row, (what it is, the device, the shape), the first on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.5 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots()
    for place, (_, time, shape) in enumerate(rows):
        left = 0.0
        for name, ms, color in zip(PARTS, parts_ms(shape, time), COLORS, strict=True):
            axes.barh(place, ms, left=left, color=color, height=0.7, label=name if place == 0 else None)
            left += ms
        axes.annotate(f"{left:.2f}", (left, place), xytext=(4, 0), textcoords="offset points", va="center", size=8)
    axes.set_yticks(range(len(rows)), [title for title, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(right=axes.get_xlim()[1] * 1.08)
    axes.set_xlabel(f"predicted ms ({rows[0][1].workload})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    write_bytes_atomically(path, picture.getvalue())
