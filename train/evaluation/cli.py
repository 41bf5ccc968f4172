"""`efficientllm-eval`: perplexity and zero-shot tasks of a model folder or an exported artefact."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...runtime.base import flags
from ...runtime.base.command import run_command
from ...runtime.base.errors import UsageError
from ...runtime.base.files import write_json_atomically, write_text_atomically
from ...runtime.base.progress import ProgressDisplay
from ..model.installed_files import source_path
from .evaluation import ComputeConfig, Evaluation, MeasureConfig, check, evaluate
from .report import markdown, rows


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
