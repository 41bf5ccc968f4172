"""`efficientllm-export`: from a checkpoint to an artefact."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..runtime.base import flags
from ..runtime.base.command import run_command
from ..runtime.base.files import folder_written_atomically, require_empty
from .checkpoint import open_checkpoint
from .request import ExportOptions, ExportRequest
from .targets import known_targets, load_exporter


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        ExportOptions,
        prog="efficientllm-export",
        description="Write a checkpoint as a file that stock runtimes load, and verify it against torch.",
    )
    parser.add_argument(
        "checkpoint", help="run folder, Hugging Face folder or hub id, .gguf file, or 'demo' (the built-in source)"
    )
    parser.add_argument("--target", required=True, metavar="TARGET", help=", ".join(known_targets()))
    parser.add_argument("--output", metavar="FOLDER", help="folder to write [CHECKPOINT-TARGET-QUANTIZE]")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --output")
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    name, target = arguments.pop("checkpoint"), arguments.pop("target")
    output, overwrite = arguments.pop("output"), arguments.pop("overwrite")
    options = flags.take(arguments, ExportOptions)
    exporter = load_exporter(target)
    suffix = f"-{options.quantize}" if options.quantize else ""
    folder = Path(output or f"{Path(name).name}-{target}{suffix}")
    require_empty(folder, overwrite, "give another --output, or --overwrite to replace it")
    with open_checkpoint(name) as checkpoint, folder_written_atomically(folder) as temporary:
        exporter(checkpoint, ExportRequest(options, folder), temporary)
    print(f"artefact: {folder}")
    return 0


def main() -> None:
    sys.exit(run_command(body))
