"""`efficientllm-eval`: perplexity and zero-shot tasks of a model folder or an exported artefact.

Evaluations as tables: one model, or several side by side with paired differences.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...runtime.base import flags
from ...runtime.base.command import run_command
from ...runtime.base.errors import UsageError
from ...runtime.base.files import write_json_atomically, write_text_atomically
from ...runtime.base.progress import ProgressDisplay
from ...runtime.base.quantities import markdown_table
from ...runtime.engines.contract_text import BITS_PER_BYTE
from ..model.source import source_path
from .evaluation import ComputeConfig, Evaluation, MeasureConfig, check, evaluate
from .perplexity import Perplexity
from .quality.measure import contract
from .scoring import TaskResult


def _name(evaluation: Evaluation) -> str:
    return Path(evaluation.model).name or evaluation.model


def _score(mean: float, stderr: float) -> str:
    return f"{mean:.3f} ± {stderr:.3f}" if math.isfinite(stderr) else f"{mean:.3f}"


def paired_difference(first: TaskResult, other: TaskResult) -> tuple[float, float, int]:
    """(mean, standard error, n) of other - first over the documents that both hold."""
    before = dict(zip(first.documents, first.values[first.metric], strict=True))
    after = dict(zip(other.documents, other.values[other.metric], strict=True))
    differences = [after[document] - before[document] for document in after if document in before]
    if not differences:
        return math.nan, math.nan, 0
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return statistics.fmean(differences), error, len(differences)


def _perplexity(found: Perplexity) -> str:
    error = f" ± {found.stderr:.2f}" if math.isfinite(found.stderr) else ""
    return f"{found.perplexity:.2f}{error} ({found.bits_per_byte:.4f} bits/byte)"


def _quality_rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Quality of the first model, and of every other one with its ratio to the first.

    A model's bits per byte are told where perplexities are of other tokens than a reader may compare them with: another
    model's beside it, or, of one alone, those of whatever it was pruned from.
    """
    reference = evaluations[0].quality
    if reference is None:
        return []
    columns = [contract(e.quality, reference, _name(evaluations[0])) for e in evaluations if e.quality is not None]
    sizes = {kind: f"{len(values)} documents" for kind, values in reference.texts.items()}
    table = [
        [f"perplexity, {kind}", sizes.get(kind, ""), *[_with_ratio(column["texts"][kind]) for column in columns]]
        for kind in columns[0]["texts"]
    ]
    bits = [each.quality.bits_per_byte for each in evaluations if each.quality is not None]
    if (len(bits) == 1 and math.isfinite(bits[0])) or any("bits_per_byte" in column for column in columns):
        table.append([BITS_PER_BYTE, "", *[f"{each:.4f}" for each in bits]])
    if all("chat_answers" in column for column in columns):
        chats, ends = len(reference.chat_answers), [column["end_of_turn"] for column in columns]
        cells = [_with_ratio(column["chat_answers"]) for column in columns]
        table.append(["perplexity, chat answers", f"{chats} answers", *cells])
        turns = [f"{ends[0]['nats']:.2f}"]
        turns += [f"{end['nats']:.2f} ({end['difference']:+.2f} ± {end['difference_stderr']:.2f})" for end in ends[1:]]
        table.append(["end of the turn, nats", f"{chats} answers", *turns])
    if all("questions" in column for column in columns):
        asked = [column["questions"] for column in columns]
        cells = [str(asked[0]["right"])]
        cells += [f"{each['right']} ({each['kept']} of {each['reference']})" for each in asked[1:]]
        table.append(["questions answered right", f"{asked[0]['asked']} questions", *cells])
    return table


def _with_ratio(found: Mapping[str, float]) -> str:
    ratio = "" if found["ratio"] == 1.0 else f" (x{found['ratio']:.3f} ± {found['ratio_stderr']:.3f})"
    return f"{found['perplexity']:.2f}{ratio}"


def rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Header and one row per measure; with several models, the change from the first in each further column."""
    first = evaluations[0]
    table = [["measure", "size", *[_name(evaluation) for evaluation in evaluations]]]
    table += _quality_rows(evaluations)
    for name, value in first.perplexity.items():
        cells = [_perplexity(evaluation.perplexity[name]) for evaluation in evaluations]
        table.append([f"perplexity, {name}", f"{value.tokens} tokens of {value.documents}{value.behind}", *cells])
    for name, result in first.tasks.items():
        cells = [_score(result.mean(), result.stderr())]
        for evaluation in evaluations[1:]:
            other = evaluation.tasks[name]
            difference, error, _ = paired_difference(result, other)
            cells.append(f"{_score(other.mean(), other.stderr())} ({difference:+.3f} ± {error:.3f})")
        table.append([f"{name} ({result.metric})", f"{len(result.documents)} documents", *cells])
    if len(first.tasks) > 1:
        averages = [statistics.fmean(r.mean() for r in evaluation.tasks.values()) for evaluation in evaluations]
        table.append(["average of tasks", "", *[f"{average:.3f}" for average in averages]])
    return table


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """The table with a line that says what ± and brackets are."""
    note = "± is one standard error"
    if len(evaluations) > 1:
        note += f"; in brackets the change from {_name(evaluations[0])}, paired document by document"
    return f"{markdown_table(rows(evaluations))}\n\n{note}.\n"


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        EvalConfig,
        prog="efficientllm-eval",
        description="Measure perplexity and zero-shot accuracy of a Hugging Face folder or an exported artefact.",
    )
    parser.add_argument(
        "model", help="Hugging Face folder, folder written by efficientllm-export, a .gguf file, or demo"
    )
    parser.add_argument("--compare", nargs="+", default=[], metavar="MODEL", help="further models, put side by side")
    parser.add_argument(
        "--output",
        default="build/eval",
        metavar="FOLDER",
        help="results.json, results.md and what is needed to go on after an interruption [build/eval]",
    )
    return parser


@dataclass(frozen=True)
class EvalConfig:
    """Everything `efficientllm-eval` can be told."""

    measures: MeasureConfig = field(default_factory=MeasureConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    models = [arguments.pop("model"), *arguments.pop("compare")]
    output = Path(arguments.pop("output"))
    config = flags.take(arguments, EvalConfig)
    check(config.measures)
    paths = {model: Path(model) if Path(model).exists() else source_path(model) for model in models}
    for model, path in paths.items():
        if not path.exists():
            raise UsageError(f"{model}: no such folder or file, and not demo, the built-in model")
    output.mkdir(parents=True, exist_ok=True)
    evaluations: list[Evaluation] = []
    with ProgressDisplay() as display:
        for model, path in paths.items():
            prefix = f"{Path(model).name}: " if len(models) > 1 else ""

            def report(what: str, done: int, total: int, prefix: str = prefix) -> None:
                display.update(f"{prefix}{what}", done, total)

            evaluations.append(evaluate(path, config.measures, config.compute, output, report))
            write_json_atomically(
                output / "results.json", {"schema_version": 1, "evaluations": [e.to_dict() for e in evaluations]}
            )
    write_text_atomically(output / "results.md", markdown(evaluations))
    _print_table(evaluations)
    print(f"\nresults: {output / 'results.json'}")
    return 0


def _print_table(evaluations: Sequence[Evaluation]) -> None:
    header, *body = rows(evaluations)
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in body:
        table.add_row(*row)
    console = Console()
    (console if console.width >= 100 else Console(width=140)).print(table)


def main() -> None:
    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
