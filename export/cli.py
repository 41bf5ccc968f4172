"""`efficientllm-export`: from a checkpoint to an artefact."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.base import flags
from ..runtime.base.command import run_command
from .request import VerifyOptions
from .run import export
from .targets import known_targets, load_exporter, refuse_option


class ExportParser(flags.Parser):
    """Has the flags of the target that the arguments name; without one, those that every target has."""

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """All values by name; UsageError for a flag that the target does not read."""
        target = _named_target(argv)
        flags.add_section(self, load_exporter(target).options if target else VerifyOptions)
        _, unknown = self.parse_known_intermixed_args(argv)
        foreign = next((word for word in unknown if word.startswith("--")), "")
        if foreign and target:
            refuse_option(target, foreign.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_"))
        return super().parse(argv)


def _named_target(argv: Sequence[str]) -> str | None:
    first = flags.Parser(add_help=False)
    first.add_argument("--target")
    target: str | None = first.parse_known_args(argv)[0].target
    return target


def build_parser() -> ExportParser:
    parser = ExportParser(
        prog="efficientllm-export",
        description="Write a checkpoint as a file that stock runtimes load, and verify it against torch.",
        epilog="efficientllm-export --target TARGET --help lists the flags of one target.",
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
    checkpoint, target, output = (arguments.pop(name) for name in ("checkpoint", "target", "output"))
    suffix = f"-{arguments['quantize']}" if arguments.get("quantize") else ""
    output = f"{Path(checkpoint).name}-{target}{suffix}" if output is None else output
    export(checkpoint, target, output, **arguments)
    return 0


def main() -> None:
    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
