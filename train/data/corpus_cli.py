"""`efficientllm-corpus`: a corpus to train on, as one file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ...runtime.base import flags
from ...runtime.base.command import run_command
from ...runtime.base.markdown import markdown_table
from ...runtime.base.progress import ProgressDisplay
from ...runtime.base.quantities import format_bytes
from .corpus import CorpusConfig, write_corpus


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        CorpusConfig,
        prog="efficientllm-corpus",
        description="Write one file of documents, for --data of efficientllm-train, from folders, files and hub "
        "datasets: mixed by their weights, the same text once.",
    )
    parser.add_argument("output", metavar="OUTPUT", help="file to write, NAME.jsonl.gz or NAME.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    output, overwrite = Path(arguments.pop("output")), bool(arguments.pop("overwrite", False))
    config = flags.take(arguments, CorpusConfig)
    with ProgressDisplay() as display:

        def report(done: int, wanted: int) -> None:
            display.update("corpus", done, wanted, f"{format_bytes(done)} of {format_bytes(wanted)} of text")

        taken = write_corpus(output, config, overwrite, report)
    rows = [["from", "documents", "text", "too short", "repeated"]]
    for each in taken:
        counts = [f"{each.documents:,}", format_bytes(each.bytes), f"{each.short:,}", f"{each.repeated:,}"]
        rows.append([each.spec.path + (" (all of it)" if each.has_ended else ""), *counts])
    print(markdown_table(rows))
    print(f"corpus: {output} ({format_bytes(output.stat().st_size)})")
    return 0


def main() -> None:
    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
