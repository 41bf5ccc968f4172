"""`efficientllm-eval`: perplexity and zero-shot tasks of a model folder or an exported artefact."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ...runtime import flags
from ...runtime.command import run_command
from ...runtime.errors import UsageError
from ...runtime.files import write_json_atomically, write_text_atomically
from .evaluation import ComputeConfig, Evaluation, MeasureConfig, check, evaluate
from .report import markdown, rows

LINE_SECONDS = 15.0
"""Seconds between lines where there is no terminal."""


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="efficientllm-eval",
        description="Measure perplexity and zero-shot accuracy of a Hugging Face folder or an exported artefact.",
    )
    parser.add_argument("model", help="Hugging Face folder, folder written by efficientllm-export, or a .gguf file")
    parser.add_argument("--compare", nargs="+", default=[], metavar="MODEL", help="further models, put side by side")
    parser.add_argument(
        "--output",
        default="build/eval",
        metavar="FOLDER",
        help="results.json, results.md and what is needed to go on after an interruption [build/eval]",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    flags.add_flags(parser, EvalConfig)
    return parser


@dataclass(frozen=True)
class EvalConfig:
    """Everything `efficientllm-eval` can be told."""

    measures: MeasureConfig = field(default_factory=MeasureConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


class Display:
    """A progress bar per measure in a terminal, a line now and then elsewhere; holds on to stderr as it was."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self.console, disable=not self.console.is_terminal, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._bars: dict[str, int] = {}
        self._last_line = time.monotonic()
        self.prefix = ""

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def update(self, what: str, done: int, total: int) -> None:
        text = f"{self.prefix}{what}"
        if self.console.is_terminal:
            if text not in self._bars:
                self._bars[text] = self.bar.add_task(text, total=total)
            # the 57 subjects of mmlu arrive one after the other under one name
            self.bar.update(self._bars[text], completed=done, total=total)  # type: ignore[arg-type]
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"{text}: {done}/{total}", highlight=False)


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    arguments.pop("debug")
    models = [arguments.pop("model"), *arguments.pop("compare")]
    output = Path(arguments.pop("output"))
    config = flags.merge(EvalConfig(), arguments, "flags")
    check(config.measures)
    for model in models:
        if not Path(model).exists():
            raise UsageError(f"{model}: no such folder or file")
    output.mkdir(parents=True, exist_ok=True)
    evaluations: list[Evaluation] = []
    with Display() as display:
        for model in models:
            display.prefix = f"{Path(model).name}: " if len(models) > 1 else ""
            evaluations.append(evaluate(Path(model), config.measures, config.compute, output, display.update))
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
