"""`efficientllm-report`: result files of efficientllm-bench, from any number of devices, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..runtime.base import flags
from ..runtime.base.errors import UsageError
from ..runtime.base.output import check_file
from ..runtime.base.quantities import print_rows
from .report_page import cells, entries, headline, is_page, write_page
from .results import Run

TERMINAL_COLUMNS = ("artefact", "device", "decode t/s", "prefill t/s", "on disk", "peak memory", "mean KL")


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="efficientllm-report",
        examples=("report laptop.json phone.json", "report laptop.json phone.json --html results.html"),
        description="Put results of efficientllm-bench, from any number of devices, side by side.",
    )
    parser.add_argument("results", nargs="+", metavar="JSON", help="file written by efficientllm-bench --json")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page: headline and sortable table")
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    html_path = Path(arguments["html"]) if arguments["html"] else None
    if html_path:
        check_file("--html", html_path, arguments["results"])
        if html_path.is_file() and html_path.stat().st_size and not is_page(html_path):
            raise UsageError(f"--html {html_path} was not written by this command; name another file")
    runs = [(Run.read(path), path) for path in map(Path, arguments["results"])]
    found = entries(runs)
    rows = [[row[name].text for name in TERMINAL_COLUMNS] for row in map(cells, found)]
    print_rows([list(TERMINAL_COLUMNS), *rows], left=(0, 1))
    print(headline(found))
    if html_path:
        write_page(html_path, runs)
        print(f"page: {html_path}")
    return 0
