"""`efficientllm-hub`: artefacts and their figures as the folder of a model hub's repository."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..runtime.base import flags
from ..runtime.base.command import run_command
from .hub_folder import CardSettings, write_hub_folder


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        CardSettings,
        prog="efficientllm-hub",
        description="Write a folder that makes a good repository of a model hub: files under the names that programs "
        "look for, and a card with what was measured. Nothing is uploaded.",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to write")
    parser.add_argument("artefacts", nargs="+", metavar="ARTEFACT", help="folder written by efficientllm-export")
    parser.add_argument(
        "--bench", action="append", metavar="JSON", help="file of efficientllm-bench --json, repeatable: speeds"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this command wrote")
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    output, artefacts, bench, overwrite = (
        arguments.pop(name, None) for name in ("output", "artefacts", "bench", "overwrite")
    )
    settings = flags.take(arguments, CardSettings)
    folder = write_hub_folder(
        Path(output), list(map(Path, artefacts)), list(map(Path, bench or ())), settings, bool(overwrite)
    )
    print(f"folder: {folder}")
    print(f"to publish: hf upload OWNER/{settings.name or folder.absolute().name} {folder}")
    return 0


def main() -> None:
    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
