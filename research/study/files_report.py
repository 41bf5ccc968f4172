"""The table of files by bytes, the picture of the front, and the front as `efficientllm-fit` reads it."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficientllm.runtime.base.files import write_text_atomically
from efficientllm.runtime.base.quantities import display_name, format_bytes, format_count, markdown_table
from efficientllm.train.reporting.plots import GROUP_COLOR, KEPT_COLOR, SOURCE_COLOR

from .divergence import mean_and_error
from .files import KINDS, FilesConfig, FilesStudy
from .points import Point

WHOLE_COLOR = "#7a8496"
MADE = {"": "rounded", "train": "trained, then rounded", "qat": "trained on its grid"}
"""What a point's training makes of its file."""
SIDES = (((6, 6), "left"), ((6, -6), "left"), ((-6, 6), "right"), ((-6, -6), "right"))
"""Where a point's name may stand: points to the right and up, and which end of it lies there."""


def over_seeds(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per point with means over seeds. The error of the KL is over seeds or documents."""
    by_point: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_point.setdefault(result["point"], []).append(result)
    rows = []
    for point, found in by_point.items():
        kl = [statistics.fmean(mean_and_error(text["kl"])[0] for text in each["texts"].values()) for each in found]
        errors = [mean_and_error(text["kl"])[1] for text in found[0]["texts"].values()]
        of_documents = math.hypot(*errors) / len(errors)
        of_seeds = statistics.stdev(kl) / math.sqrt(len(kl)) if len(kl) > 1 else of_documents
        kinds = found[0]["bits_per_byte"]
        rows.append(
            {
                "point": point,
                "seeds": len(found),
                "file_bytes": round(statistics.fmean(each["file_bytes"] for each in found)),
                "parameters": round(statistics.fmean(each["parameters"] for each in found)),
                "kl": statistics.fmean(kl),
                "kl_error": of_seeds,
                "bits_per_byte": {
                    kind: statistics.fmean(each["bits_per_byte"][kind] for each in found) for kind in kinds
                },
                "chat_answers": _mean_of(found, "chat_answers"),
                "right": _mean_of(found, "right"),
                "tasks": {name: statistics.fmean(each["tasks"][name] for each in found) for name in _tasks_of(found)},
            }
        )
    return rows


def _tasks_of(found: Sequence[dict[str, Any]]) -> list[str]:
    """Return the tasks that all of `found` were measured on."""
    return [name for name in found[0].get("tasks", {}) if all(name in each.get("tasks", {}) for each in found)]


def _mean_of(found: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [each[name] for each in found if each[name] is not None]
    return statistics.fmean(values) if values else None


def is_on_front(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether no file of at most the same size is closer to the source."""
    return not any(
        other["kl"] < row["kl"] and other["file_bytes"] <= row["file_bytes"] for other in rows if other is not row
    )


def timings(study: FilesStudy) -> dict[str, dict[str, Any]]:
    """Return {point: result of efficientllm-bench for its file}, {} if nothing was timed."""
    path = study.folder / "bench.json"
    if not path.is_file():
        return {}
    by_path = {str(study.artefact(job)): str(job.point) for job in study.jobs if not job.seed}
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {by_path[each["artefact"]]: each for each in results if each["artefact"] in by_path}


def table(rows: Sequence[dict[str, Any]], timed: dict[str, dict[str, Any]]) -> str:
    """Return the table in Markdown. Files on the front are bold."""
    kinds = list(rows[0]["bits_per_byte"])
    speeds = list(next(iter(timed.values()))["speeds"]) if timed else []
    header = ["file", "on disk", "parameters", "KL from the source", *(f"bits per byte, {kind}" for kind in kinds)]
    tasks = list(dict.fromkeys(name for row in rows for name in row["tasks"]))
    header += ["chat answers", "questions", *tasks, *speeds, *(["peak RSS"] if timed else [])]
    lines = [header]
    for row in rows:
        name = f"**{row['point']}**" if is_on_front(row, rows) else row["point"]
        seeds = f" ({row['seeds']} seeds)" if row["seeds"] > 1 else ""
        chat = "" if row["chat_answers"] is None else f"{math.exp(row['chat_answers']):.1f}"
        line = [f"{name}{seeds}", format_bytes(row["file_bytes"]), format_count(row["parameters"])]
        line += [f"{row['kl']:.3f} ± {row['kl_error']:.3f}", *(f"{row['bits_per_byte'][kind]:.3f}" for kind in kinds)]
        line += [chat, "" if row["right"] is None else f"{row['right']:.0f}"]
        line += [f"{row['tasks'][name]:.3f}" if name in row["tasks"] else "" for name in tasks]
        figures = timed.get(row["point"])
        if timed:
            line += [f"{figures['speeds'][name]['median']:.0f}" if figures else "" for name in speeds]
            line.append(format_bytes(figures["peak_rss_bytes"]) if figures else "")
        lines.append(line)
    return markdown_table(lines)


def write_files_report(study: FilesStudy, path: Path) -> None:
    """Write FILE.md, FILE.png and FILE.jsonl, which has all points."""
    rows = over_seeds(study.results())
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*_heading(study.config, path), table(rows, timings(study)), ""])
    write_text_atomically(path, text)
    lines = [
        json.dumps({key: row[key] for key in ("point", "file_bytes", "parameters", "kl", "kl_error")}) for row in rows
    ]
    write_text_atomically(path.with_suffix(".jsonl"), "\n".join(lines) + "\n")
    draw_front(rows, path.with_suffix(".png"))


def _heading(config: FilesConfig, path: Path) -> list[str]:
    """Return the lines that describe the settings of the table."""
    data = ", ".join(display_name(each) for each in config.data)
    tasks = f" Tasks have {config.limit or 'all'} documents each." if config.tasks != ("none",) else ""
    return [
        "# Files by bytes",
        "",
        "Written by `python -m research.study --equal-bytes`. The name of a file is its type, the type of its head "
        "and embedding after `/`, and the bytes that it was pruned to after `@`. Files with `+imatrix` are rounded by "
        "an importance matrix. Files with `+qat` are trained on their grid. Bold files are on the front: no file of "
        "at most their size is closer to the source.",
        "",
        f"- The source is {display_name(config.source)}. Training takes {config.tokens:,} tokens of {data}. The batch "
        f"is {config.batch_size} x {config.sequence_length}, the peak learning rate {config.learning_rate:g}.",
        f"- KL is in nats per token from the fp32 source, in llama.cpp. It is the mean of {' and '.join(KINDS)} (first "
        f"256 tokens of {config.documents} each), ± its standard error.",
        f"- *Chat answers* is a perplexity. *Questions* counts right answers of a hundred.{tasks}",
        f"- Speeds are in tokens per second, by efficientllm-bench with {config.threads or 'all'} threads in "
        f"{config.rounds} rounds.",
        "",
        f"![KL and bytes]({path.with_suffix('.png').name})",
        "",
    ]


def draw_front(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw KL against megabytes: whole models grey, pruned ones blue, and filled if trained on their grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.subplots()
    shown = set[str]()
    for row in rows:
        point = Point.parse(row["point"])
        color = KEPT_COLOR if point.target_bytes else WHOLE_COLOR
        fill = color if point.training == "qat" else "white"
        place = (row["file_bytes"] / 1e6, row["kl"])
        kind = f"{'pruned' if point.target_bytes else 'whole'}, {MADE[point.training]}"
        label = kind if kind not in shown else None
        shown.add(kind)
        bars = axes.errorbar(
            *place, yerr=row["kl_error"], label=label, color=color, linestyle="", marker="o", capsize=2
        )
        bars.lines[0].set_markerfacecolor(fill)
    front = sorted((row["file_bytes"] / 1e6, row["kl"]) for row in rows if is_on_front(row, rows))
    axes.step(*zip(*front, strict=True), where="post", color=GROUP_COLOR, linewidth=1, zorder=0, label="front")
    axes.set_yscale("log")
    axes.set_xlabel("megabytes on disk")
    axes.set_ylabel("KL from the unquantised source, nats per token")
    axes.grid(color=SOURCE_COLOR, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.set_dpi(110)
    _name_points(axes, [((row["file_bytes"] / 1e6, row["kl"]), row["point"]) for row in rows], front)
    figure.savefig(path, dpi=figure.dpi)


def _name_points(
    axes: Any, named: Sequence[tuple[tuple[float, float], str]], front: Sequence[tuple[float, float]]
) -> None:
    """Write every name beside its point, where it covers the fewest points, names and lines of the front."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    centres = axes.transData.transform([place for place, _ in named])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centres]
    corners = axes.transData.transform(front)
    for (x, y), (next_x, next_y) in itertools.pairwise(corners):
        taken += [Bbox([[x, y], [next_x, y]]), Bbox([[next_x, next_y], [next_x, y]])]
    for place, name in named:
        texts = [
            axes.annotate(name, place, xytext=offset, textcoords="offset points", size=7, ha=side, va="center")
            for offset, side in SIDES
        ]
        boxes = [text.get_window_extent() for text in texts]
        best = min(range(len(SIDES)), key=lambda index: boxes[index].count_overlaps(taken))
        taken.append(boxes[best])
        for text in texts:
            if text is not texts[best]:
                text.remove()
