"""Write the table and the picture of the home-control job from the files of its measurements.

    python -m research.jobs.table DATA --scores RESULTS... --bench BENCH --output FOLDER

DATA is a folder of `research.jobs.home`, RESULTS are files of `efficientllm-eval --task`, and BENCH are files of
`efficientllm-bench --json` of the same artefacts. A row is named after the folder of its results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from efficientllm.devices.results import Result, Run
from efficientllm.runtime.base.files import write_text_atomically
from efficientllm.runtime.base.quantities import markdown_table
from efficientllm.train.evaluation.evaluate import Evaluation
from efficientllm.train.evaluation.jobs import JobResult
from efficientllm.train.reporting.plots import KEPT_COLOR, SOURCE_COLOR

from .baselines import baselines

OTHER_COLOR = "0.35"


@dataclass(frozen=True)
class Row:
    """One way to answer the requests."""

    name: str
    result: JobResult
    speed: Result | None = None

    @property
    def mb(self) -> float | None:
        return self.speed.file_bytes / 1e6 if self.speed is not None else None

    @property
    def ms(self) -> float | None:
        """Return the mean milliseconds of an answer, prompt included."""
        return self.result.ms_per_answer if self.speed is not None else None

    def cells(self) -> list[str]:
        """Return the cells of the table."""
        names = ("exact", "function", "argument_f1", "refused")
        exact = f"{self.result.mean('exact'):.3f} ± {self.result.stderr('exact'):.3f}"
        others = [f"{self.result.mean(name):.3f}" for name in names[1:]]
        memory = f"{self.speed.peak_rss_bytes / 1e6:.0f}" if self.speed is not None else ""
        numbers = [f"{value:.{digits}f}" if value is not None else "" for value, digits in ((self.mb, 1), (self.ms, 0))]
        return [self.name, str(len(self.result.answers)), exact, *others, *numbers, memory]


HEADER = ["", "requests", "exact calls", "function", "F1 of arguments", "refusals", "MB", "ms an answer", "peak MB"]


def rows_of_models(scores: Sequence[Path], benches: Sequence[Path]) -> list[Row]:
    """Return a row for every model of every results file, best first."""
    speeds = {Path(each.artefact).resolve(): each for bench in benches for each in Run.read(bench).results}
    rows = []
    for path in scores:
        for values in json.loads(path.read_text(encoding="utf-8"))["evaluations"]:
            evaluation = Evaluation.from_dict(values)
            if evaluation.job is not None:
                name = path.parent.name.replace("-", ", ")
                rows.append(Row(name, evaluation.job, speeds.get(Path(evaluation.model).resolve())))
    return sorted(rows, key=lambda row: -row.result.mean("exact"))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw exact calls against bytes, pruned files in another colour. Methods without a file are lines.

    Several sizes of one kind, such as "pruned, named" and "pruned, 20MB, named", are connected.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(", ".join(part for part in row.name.split(", ") if not part.endswith("MB")), []).append(row)
    for kind, same in kinds.items():
        sizes = sorted((row.mb, row.result.mean("exact"), row.result.stderr("exact")) for row in same if row.mb)
        if sizes:
            color = KEPT_COLOR if kind.startswith("pruned") else OTHER_COLOR
            megabytes, exact, errors = zip(*sizes, strict=True)
            axes.errorbar(megabytes, exact, yerr=errors, fmt="o-", color=color, capsize=3)
            axes.annotate(kind, sizes[-1][:2], xytext=(6, 4), textcoords="offset points", size=8)
        else:
            level = same[0].result.mean("exact")
            axes.axhline(level, color=SOURCE_COLOR, linewidth=1)
            axes.annotate(kind, (0, level), xytext=(4, 3), textcoords="offset points", size=8)
    axes.set_xlim(0, 1.35 * max((row.mb for row in rows if row.mb is not None), default=1))
    axes.set_ylim(0, 0.1 + max(row.result.mean("exact") + row.result.stderr("exact") for row in rows))
    axes.set_xlabel("MB of the file")
    axes.set_ylabel("exact calls of held-out requests")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Write job.md and job.png and print the table."""
    parser = argparse.ArgumentParser(description="Write the table and the picture of the home-control job.")
    parser.add_argument("data", type=Path, help="folder of research.jobs.home")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="files of efficientllm-eval --task")
    parser.add_argument("--bench", type=Path, nargs="+", required=True, help="files of efficientllm-bench --json")
    parser.add_argument("--output", type=Path, required=True, help="folder for job.md and job.png")
    parser.add_argument("--limit", type=int, default=100, help="requests for the methods without a file [100]")
    arguments = parser.parse_args()
    rows = rows_of_models(arguments.scores, arguments.bench)
    rows += [Row(name, result) for name, result in baselines(arguments.data, arguments.limit).items()]
    table = markdown_table([HEADER, *(row.cells() for row in rows)])
    write_text_atomically(arguments.output / "job.md", table + "\n")
    draw(rows, arguments.output / "job.png")
    print(table)


if __name__ == "__main__":
    main()
