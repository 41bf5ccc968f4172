"""`efficientllm-bench`: size, speed, memory and energy of artefacts on this machine, a board or a phone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..runtime.base import flags
from ..runtime.base.errors import UsageError
from ..runtime.base.output import check_file
from ..runtime.base.quantities import print_rows
from ..runtime.engines.artefact import ARTEFACT_HELP, Artefact
from ..runtime.latency.profile import DeviceProfile
from . import run_table
from .bench import as_profiled, benchmark, journal_path, log_progress
from .device import DeviceOptions, open_device
from .profiler import ProfileOptions, profile, summary
from .results import BenchOptions

OWN_KEYS = {"json": {"schema_version", "device", "results"}, "profile": {"measured_on", "table"}}
"""Output flag -> keys of the files that are written for it. A file without them is not overwritten."""


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        DeviceOptions,
        BenchOptions,
        ProfileOptions,
        prog="efficientllm-bench",
        examples=("bench small-gguf other-gguf --json laptop.json", "bench small-gguf --device ssh://pi@raspberrypi"),
        description="Measure artefacts on this machine, a board or a phone: bytes, load time, time to first token, "
        "prefill (pp) and decode (tg) speed as llama-bench names them, memory, temperature and energy.",
    )
    parser.add_argument("artefacts", nargs="*", metavar="ARTEFACT", help=ARTEFACT_HELP)
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write all figures as JSON; an interrupted run resumes from it")
    output.add_argument(
        "--predict", metavar="PROFILE", help="also print the predictions of a device profile, written by --profile"
    )
    output.add_argument(
        "--profile",
        metavar="FILE",
        help="measure the latency profile of the device, in milliseconds of each part of a decoder, and write it as "
        "JSON (needs the extras bench and export)",
    )
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    paths = arguments.pop("artefacts")
    predict_path = arguments.pop("predict")
    inputs = [*paths, *([predict_path] if predict_path else [])]
    json_path, profile_path = (_output_path(arguments, name, inputs) for name in OWN_KEYS)
    if json_path and profile_path and json_path.resolve() == profile_path.resolve():
        raise UsageError(f"--profile {profile_path} is also --json; name two files")
    device_options, options = flags.take(arguments, DeviceOptions), flags.take(arguments, BenchOptions)
    profile_options = flags.take(arguments, ProfileOptions)
    if not paths and not profile_path:
        raise UsageError("give at least one artefact (see efficientllm-bench --help)")
    # Loaded before the measurement, so that a damaged profile is reported at once.
    prediction = DeviceProfile.load(Path(predict_path)) if predict_path else None
    artefacts = [Artefact.open(path) for path in paths]
    if artefacts:
        measured = options if prediction is None else as_profiled(options, prediction, artefacts)
        run = benchmark(artefacts, measured, device_options, json_path)
        run_table.print_table(run)
        if prediction is not None:
            print_rows(run_table.prediction_rows(run, prediction), left=(0, 1))
    if profile_path:
        with contextlib.closing(open_device(device_options, log_progress)) as device:
            print(summary(profile(device, options, profile_options, profile_path, log_progress)))
    return 0


def _output_path(arguments: dict[str, str | None], name: str, inputs: Sequence[str]) -> Path | None:
    """Return the path of an output flag. Raises UsageError before the work if another file would be overwritten."""
    value = arguments.pop(name)
    if not value:
        return None
    path, flag = Path(value), f"--{name}"
    check_file(flag, path, inputs)
    if name == "json" and (journal := journal_path(path)).is_dir():
        raise UsageError(f"{flag} {path}: its journal {journal} is a folder; name another file")
    if path.is_file() and path.stat().st_size and not _has_keys(path, OWN_KEYS[name]):
        raise UsageError(f"{flag} {path} was not written by this command; name another file")
    return path


def _has_keys(path: Path, keys: set[str]) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and keys <= values.keys()
