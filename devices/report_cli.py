"""`efficientllm-report`: result files of efficientllm-bench, of any number of devices, on one page."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..runtime.base import flags
from ..runtime.base.command import run_command
from ..runtime.base.output import check_file
from . import report as collection
from .report import print_rows
from .results import Run

SHOWN = ("artefact", "device", "decode t/s", "prefill t/s", "on disk", "peak memory", "mean KL")
"""Columns that a terminal has room for."""


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="efficientllm-report",
        description="Put results of efficientllm-bench, of any number of devices, side by side.",
    )
    parser.add_argument("results", nargs="+", metavar="JSON", help="file written by efficientllm-bench --json")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page: headline, sortable table, plot")
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    html = Path(arguments["html"]) if arguments["html"] else None
    folder = html.absolute().parent if html else Path.cwd()
    if html:
        check_file("--html", html, arguments["results"])
    paths = [Path(name) for name in arguments["results"]]
    runs = [(Run.read(path), Path(os.path.relpath(path, folder)).as_posix()) for path in paths]
    found = collection.entries(runs)
    indices = [collection.COLUMNS.index(name) for name in SHOWN]
    rows = [[row[index].text for index in indices] for row in map(collection.cells, found)]
    print_rows([list(SHOWN), *rows], left=(0, 1))
    print(collection.headline(found))
    if html:
        collection.write_page(html, runs)
        print(f"page: {html}")
    return 0


def main() -> None:
    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
