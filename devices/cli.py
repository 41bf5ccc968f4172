"""`efficientllm-bench`: size, speed and memory of artefacts."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..runtime import flags
from ..runtime.command import run_command
from ..runtime.errors import UsageError
from ..runtime.files import write_json_atomically
from .local import BenchOptions, Result, bench_local
from .report import markdown, print_table


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="efficientllm-bench",
        description="Measure artefacts on this machine: bytes, load time, prefill and decode speed, peak memory.",
    )
    parser.add_argument(
        "artefacts", nargs="+", metavar="ARTEFACT", help="folder of efficientllm-export, or a .gguf file"
    )
    parser.add_argument("--json", metavar="FILE", help="write every figure as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    flags.add_flags(parser, BenchOptions)
    return parser


def device_description() -> dict[str, Any]:
    """What this machine is, as far as it tells."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {"system": platform.system(), "machine": platform.machine(), "cpu": cpu, "cores": os.cpu_count()}


def to_json(results: Sequence[Result], options: BenchOptions) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "device": device_description(),
        "options": asdict(options),
        "results": [asdict(result) for result in results],
    }


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    arguments.pop("debug")
    artefacts, json_path = arguments.pop("artefacts"), arguments.pop("json")
    as_markdown = arguments.pop("markdown")
    options = flags.merge(BenchOptions(), arguments, "flags")
    if json_path and not Path(json_path).absolute().parent.is_dir():
        raise UsageError(f"--json {json_path}: its folder does not exist")
    results = bench_local(artefacts, options, lambda line: print(line, file=sys.stderr, flush=True))
    if as_markdown:
        print(markdown(results, options), end="")
    else:
        print_table(results, options)
    if json_path:
        write_json_atomically(Path(json_path), to_json(results, options))
    return 0


def main() -> None:
    sys.exit(run_command(body))
