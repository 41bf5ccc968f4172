"""How each arm's loss falls with tokens: `python -m research.study.law STUDY STUDY ...`.

The studies differ in --tokens and --learning-rate alone. An arm counts with its better rate at each length. The law is
gap(T) = A T^-b (token_law), fitted to all seeds of the lengths up to --fit-through. Longer lengths are predicted, with
the band of 95 % for one further run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.base.files import write_json_atomically
from efficientllm.runtime.base.quantities import markdown_table

from ..token_law import RunPoint, TokenLaw, draw_laws, fit
from .arms import ARMS
from .result import StudyResult


@dataclass(frozen=True)
class LawConfig:
    """Law."""

    fit_through: int = flags.count(491_520)
    """Longest runs that the laws are fitted to."""
    predict: tuple[str, ...] = flags.comma_separated("1966080", "3145728")
    """Lengths to predict, in tokens, comma-separated."""
    output: str = ""
    """JSON file to write with every run."""
    picture: str = ""
    """PNG file to write with the laws and their bands."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


Row = dict[str, Any]
"""A run: arm, keep, seed, tokens, rate, sizes, cost, and nats: `gap` (above the source), `chat`, `turn_end`."""
RUN = ("arm", "keep", "seed", "tokens", "learning_rate")
"""What tells one run from another."""
Runs = dict[int, list[Row]]
"""{tokens: seeds}, shortest first."""


def read_rows(folder: Path) -> list[Row]:
    """Return the trained runs of a study, or of a file of runs. Raises UsageError without the untouched source."""
    if folder.suffix == ".json" and folder.is_file():
        return json.loads(folder.read_text(encoding="utf-8"))["runs"]
    path = folder / "source-s0" / "result.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no study with the untouched source; run it with --arms source first")
    source, rows = StudyResult.read(path), []
    rate = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["learning_rate"]
    for result in map(StudyResult.read, sorted(folder.glob("**/result.json"))):
        quality = result.evaluation.quality
        if result.tokens and quality is not None:
            names = ("arm", "keep", "seed", "tokens", "parameters", "seconds", "flops", "commit")
            row: Row = {name: getattr(result, name) for name in names}
            row |= {"source_parameters": source.parameters, "learning_rate": rate, "gap": result.nats - source.nats}
            chats = {"chat": statistics.fmean(quality.chat_answers), "turn_end": statistics.fmean(quality.turn_ends)}
            rows.append(row | chats)
    return rows


def mean_gap(rows: Sequence[Row]) -> float:
    """Return the mean over seeds."""
    return statistics.fmean(row["gap"] for row in rows)


def at_best_rate(rows: Sequence[Row], keep: float, arm: str) -> Runs:
    """Return the runs of an arm, at each length those of the rate with the lowest mean gap."""
    of_rates: dict[int, dict[float, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if (row["keep"], row["arm"]) == (keep, arm):
            of_rates.setdefault(row["tokens"], {}).setdefault(row["learning_rate"], []).append(row)
    return {tokens: min(rates.values(), key=mean_gap) for tokens, rates in of_rates.items()}


def law_of(runs: Runs, through: int) -> TokenLaw | None:
    """Return the law of runs up to a length; None with fewer than two lengths, or where one is below the source."""
    rows = [row for tokens, seeds in runs.items() if tokens <= through for row in seeds]
    if len({row["tokens"] for row in rows}) < 2 or min(row["gap"] for row in rows) <= 0:
        return None
    names = ("arm", "tokens", "parameters", "source_parameters", "gap")
    return fit([RunPoint(*(row[name] for name in names)) for row in rows])


def _measured(seeds: Sequence[Row]) -> str:
    return f"{mean_gap(seeds):.3f} ({len(seeds)} at {seeds[0]['learning_rate']:g})" if seeds else ""


def _predicted(law: TokenLaw | None, tokens: int) -> str:
    band = law.band(tokens) if law is not None else None
    return f"{law.gap(tokens):.3f} ({band[0]:.3f}-{band[1]:.3f})" if law is not None and band is not None else ""


def body(argv: Sequence[str]) -> int:
    """Print the table, and write rows and picture if requested."""
    parser = flags.Parser(LawConfig, prog="python -m research.study.law", description=__doc__)
    parser.add_argument("studies", nargs="+", metavar="STUDY", help="output of research.study, or of this --output")
    arguments = parser.parse(argv)
    found = [row for folder in arguments.pop("studies") for row in read_rows(Path(folder))]
    rows = [*{tuple(row[name] for name in RUN): row for row in found}.values()]
    config, laws, later = flags.take(arguments, LawConfig), {}, {}
    lengths, predicted = sorted({row["tokens"] for row in rows}), [int(tokens) for tokens in config.predict]
    heads = [*(f"{tokens:,}" for tokens in lengths), "law", *(f"{tokens:,} by the law" for tokens in predicted)]
    table = [["keep", "arm", "parameters", *heads]]
    for keep in sorted({row["keep"] for row in rows}, reverse=True):
        for arm, description in ARMS.items():
            if runs := at_best_rate(rows, keep, arm):
                law = law_of(runs, config.fit_through)
                if law is not None:
                    laws[name := f"{description.title}, {keep:g}"] = law
                    later[name] = {at: mean_gap(seeds) for at, seeds in runs.items() if at > config.fit_through}
                cells = [*(_measured(runs.get(tokens, [])) for tokens in lengths), law.formula if law else ""]
                cells += [_predicted(law, tokens) for tokens in predicted]
                table.append(
                    [f"{keep:g}", description.title, f"{next(iter(runs.values()))[0]['parameters']:,}", *cells]
                )
    print(markdown_table(table))
    if config.output:
        write_json_atomically(Path(config.output), {"schema_version": 1, "runs": rows})
    if config.picture:
        draw_laws(laws, later, max(predicted), Path(config.picture))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
