"""`python -m research.study`: run the study and write its page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.progress import ProgressDisplay
from efficientllm.runtime.base.quantities import format_duration

from .report import write_report
from .study import Study, StudyConfig, jobs

EQUAL_BYTES = "--equal-bytes"
"""The study of files instead, with flags of its own (files_cli.py)."""


def build_parser() -> flags.Parser:
    parser = flags.Parser(StudyConfig, prog="python -m research.study", description=__doc__)
    parser.add_argument(EQUAL_BYTES, action="store_true", help="the study of files by bytes; its own --help")
    parser.add_argument("--report", metavar="FILE", help="Markdown page to write; its JSON and figures go beside it")
    parser.add_argument("--report-only", action="store_true", help="write the page from what is finished, run nothing")
    return parser


def body(argv: Sequence[str]) -> int:
    if EQUAL_BYTES in argv:
        from . import files_cli

        return files_cli.body([word for word in argv if word != EQUAL_BYTES])
    arguments = build_parser().parse(argv)
    del arguments[EQUAL_BYTES.strip("-").replace("-", "_")]
    report, report_only = arguments.pop("report", None), arguments.pop("report_only")
    config = flags.take(arguments, StudyConfig)
    study = Study(config)
    todo = jobs(config)
    for number, job in enumerate(todo, 1):
        if report_only or study.result_path(job).is_file():
            continue
        began = time.monotonic()
        print(f"[{number}/{len(todo)}] {job.name}", flush=True)
        try:
            with ProgressDisplay() as display:
                study.run(job, display.update)
        except KeyboardInterrupt:
            print("the same command continues the study", flush=True)
            raise
        print(f"[{number}/{len(todo)}] {job.name} done in {format_duration(time.monotonic() - began)}", flush=True)
        if report:
            write_report(study, Path(report))
    if report:
        write_report(study, Path(report))
        print(f"report: {report}")
    return 0
