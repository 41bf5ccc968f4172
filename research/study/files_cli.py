"""`python -m research.study --equal-bytes`: files of one model sorted by bytes, by pruning and by bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from efficientllm.runtime.base import flags

from .files import FilesConfig, FilesStudy
from .files_report import write_files_report


def body(argv: Sequence[str]) -> int:
    """`python -m research.study --equal-bytes ...`, without that flag."""
    parser = flags.Parser(FilesConfig, prog="python -m research.study --equal-bytes", description=__doc__)
    parser.add_argument("--report", metavar="FILE", help="Markdown table to write; its picture and front go beside it")
    parser.add_argument("--report-only", action="store_true", help="write it from what is finished, run nothing")
    arguments = parser.parse(argv)
    report, report_only = arguments.pop("report", None), arguments.pop("report_only")
    study = FilesStudy(flags.take(arguments, FilesConfig))
    for number, job in enumerate(study.jobs if not report_only else (), 1):
        print(f"[{number}/{len(study.jobs)}] {job.name}", flush=True)
        study.run(job)
    if not report_only and study.config.rounds:
        study.time()
    if report:
        write_files_report(study, Path(report))
        print(f"report: {report}")
    return 0
