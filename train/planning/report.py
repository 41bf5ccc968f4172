"""Text and picture of a plan."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from ...runtime.base.files import write_bytes_atomically
from ...runtime.base.quantities import format_bytes, format_count, markdown_table
from ..model.architecture import Architecture
from ..pruning.measures import DeviceTime, decoder_shape
from .targets import Candidate, Meaning, weight_bytes

PARTS = ("attention", "FFN", "LM head", "rest")


def parts_ms(architecture: Architecture, time: DeviceTime) -> tuple[float, float, float, float]:
    """Return the milliseconds of attention, FFN, LM head and the rest of a workload."""
    found = time.profile.breakdown(decoder_shape(architecture), time.workload)
    return sum(found.attention_ms), sum(found.ffn_ms), found.head_ms, found.token_ms


def device_lines(source: Architecture, time: DeviceTime) -> list[str]:
    """Describe the device, the error of its profile, and the source's milliseconds by part."""
    parts = ", ".join(f"{name} {ms:.2f}" for name, ms in zip(PARTS, parts_ms(source, time), strict=True))
    lines = [f"{time.describe()}: {time.measure.of(source):.2f} ms ({parts})"]
    for error in time.profile.errors:
        lines.append(
            f"  the profile's error on {error.models} irregular models at depth {error.depth}: median "
            f"{error.median:.1%}, worst {error.worst:.1%}"
        )
    if time.profile.measured_on.emulated:
        lines.append("  EMULATED: no figure here is the device's")
    return lines


def price_table(source: Architecture, found: Sequence[Candidate], times: Sequence[DeviceTime]) -> str:
    """Return the table of candidates with milliseconds, and microseconds per million parameters, by device."""
    header = ["what goes", "parameters"]
    for time in times:
        name = time.profile.measured_on.device if len(times) > 1 else ""
        header += [f"{name} ms".strip(), f"{name} us per M".strip()]
    rows = [header]
    for candidate in found:
        parameters = candidate.parameters(source)
        row = [candidate.title, format_count(parameters)]
        for time in times:
            ms = candidate.milliseconds(source, time)
            row += [f"{ms:.3f}", f"{1e9 * ms / parameters:.0f}"]
        rows.append(row)
    return markdown_table(rows)


def target_table(source: Architecture, found: Sequence[tuple[str, DeviceTime, Meaning]]) -> str:
    """Return the table of targets with remaining parameters (and bytes of weights for GGUF types)."""
    rows = [["target", "device", "ms", "leaves at most", "in equal layers"]]
    for target, time, meaning in found:
        device = time.profile.measured_on.device
        sizes = [_size(shape, source, time) for shape in (meaning.largest, meaning.equal)]
        rows.append([target, device, f"{meaning.ms:.2f}", *sizes])
    return markdown_table(rows, left=(0, 1))


def _size(architecture: Architecture | None, source: Architecture, time: DeviceTime) -> str:
    if architecture is None:
        return "-"
    share = architecture.num_parameters / source.num_parameters
    size = weight_bytes(architecture, time)
    stored = f", {format_bytes(size)}" if size is not None else ""
    return f"{format_count(architecture.num_parameters)} ({share:.0%}{stored})"


COLORS = ("#e08a3c", "#2f6db3", "#4f9d69", "#d5dae3")


def draw(rows: Sequence[tuple[str, DeviceTime, Architecture]], path: Path) -> None:
    """Draw one stacked bar per row of (label, device, shape), the first on top."""
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
