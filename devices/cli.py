"""`efficientllm-bench`: size, speed, memory and energy of artefacts on this machine, a board or a phone."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..runtime.base import flags
from ..runtime.base.command import run_command
from ..runtime.base.errors import UsageError
from ..runtime.base.output import check_file
from ..runtime.latency.profile import DeviceProfile
from . import compare, predicted, report
from .bench import benchmark, journal_path, log_progress
from .device import DeviceOptions, open_device
from .profiler import ProfileOptions, profile, summary
from .results import BenchOptions, Run


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        DeviceOptions,
        BenchOptions,
        ProfileOptions,
        prog="efficientllm-bench",
        description="Measure artefacts on this machine, a board or a phone: bytes, load time, time to first token, "
        "prefill (pp) and decode (tg) speed as llama-bench names them, memory, temperature and energy.",
    )
    parser.add_argument(
        "artefacts", nargs="*", metavar="ARTEFACT", help="folder of efficientllm-export, or a .gguf or .pte file"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write every figure as JSON; an interrupted run goes on from it")
    output.add_argument("--html", metavar="FILE", help="write a self-contained page with plots")
    output.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    output.add_argument(
        "--compare", nargs=2, metavar=("OLD", "NEW"), help="compare two JSON files; changes beyond noise are flagged"
    )
    output.add_argument(
        "--predict", metavar="PROFILE", help="also show what a device profile, as --profile writes it, says of them"
    )
    output.add_argument(
        "--profile",
        metavar="FILE",
        help="measure the device's latency table, milliseconds of every part of a decoder, and write it as JSON",
    )
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    paths, as_markdown = arguments.pop("artefacts"), arguments.pop("markdown")
    compared, predicting = arguments.pop("compare"), arguments.pop("predict")
    read = [*paths, *(compared or ()), *filter(None, [predicting])]
    outputs = {name: _output(arguments, name, read) for name in ("json", "html", "profile")}
    json_path, html_path, profile_path = outputs.values()
    _check_apart(outputs)
    where, options = flags.take(arguments, DeviceOptions), flags.take(arguments, BenchOptions)
    profile_options = flags.take(arguments, ProfileOptions)
    if compared:
        if paths or profile_path:
            raise UsageError("--compare reads two result files; give no artefact and no --profile with it")
        return _compare([Path(name) for name in compared], html_path, as_markdown)
    if not paths and not profile_path:
        raise UsageError("give at least one artefact (see efficientllm-bench --help)")
    if html_path:
        report.require_plots()
    table = DeviceProfile.load(Path(predicting)) if predicting else None  # before the work
    if paths:
        run = benchmark(paths, options, where, json_path)
        _show(run, html_path, as_markdown)
        if table is not None:
            report.print_rows(predicted.rows(run, table), left=(0, 1))
    if profile_path:
        with contextlib.closing(open_device(where, log_progress)) as device:
            print(summary(profile(device, options, profile_options, profile_path, log_progress)))
    return 0


def _output(arguments: dict[str, str | None], name: str, read: Sequence[str]) -> Path | None:
    """A file to write, checked before the work; UsageError where something of somebody else's would be lost."""
    value = arguments.pop(name)
    if not value:
        return None
    path, flag = Path(value), f"--{name}"
    check_file(flag, path, read)
    if name == "json" and (beside := journal_path(path)).is_dir():
        raise UsageError(f"{flag} {path}: {beside} is a folder, where the run's notes would lie; name another file")
    if path.is_file() and path.stat().st_size and not OURS[name](path):
        raise UsageError(f"{flag} {path} holds something else than this command writes; name another file")
    return path


def _check_apart(outputs: Mapping[str, Path | None]) -> None:
    places: dict[Path, str] = {}
    for name, path in outputs.items():
        if path is not None and (other := places.setdefault(path.resolve(), name)) != name:
            raise UsageError(f"--{name} {path} is --{other}, too; name two files")


def _is_json_with(*keys: str) -> Callable[[Path], bool]:
    def holds(path: Path) -> bool:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(values, dict) and all(key in values for key in keys)

    return holds


def _is_page(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(PAGE_BEGINS)).lower() == PAGE_BEGINS


PAGE_BEGINS = b"<!doctype html>"
OURS: dict[str, Callable[[Path], bool]] = {
    "json": _is_json_with("schema_version", "device", "results"),
    "html": _is_page,
    "profile": _is_json_with("measured_on", "table"),
}
"""Flag of a file that is written -> whether a file that is there already is one of the kind."""


def _show(run: Run, html_path: Path | None, as_markdown: bool) -> None:
    if as_markdown:
        print(report.markdown(run), end="")
    else:
        report.print_table(run)
    if html_path:
        report.write_html(html_path, [run])


def _compare(paths: Sequence[Path], html_path: Path | None, as_markdown: bool) -> int:
    old, new = (Run.read(path) for path in paths)
    changes = compare.changes(old, new)
    if as_markdown:
        print(compare.markdown(changes), end="")
    else:
        compare.print_table(changes)
    for line in compare.differences(old, new):
        print(f"note: {line}")
    if html_path:
        report.write_html(html_path, [old, new])
    return 0


def main() -> None:
    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
