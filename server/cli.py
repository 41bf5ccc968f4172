"""`efficientllm-serve`: an artefact behind an OpenAI-style endpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime import flags
from ..runtime.command import run_command
from ..runtime.engine import EngineOptions, load
from ..runtime.errors import MissingExtraError


@dataclass(frozen=True)
class ServeOptions:
    """server"""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to listen on."""
    api_key: str = ""
    """Key that clients must send; empty: none."""
    waiting: int = 8
    """Requests that may wait behind the one being answered; more are refused with 429."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError(f"--port {self.port}: must be between 1 and 65535")
        if self.waiting < 0:
            raise ValueError(f"--waiting {self.waiting}: must not be negative")


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="efficientllm-serve", description="Serve an exported model to any OpenAI client (chat completions)."
    )
    parser.add_argument("artefact", help="folder written by efficientllm-export, or a .gguf file")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    for section in (ServeOptions, EngineOptions):
        flags.add_flags(parser, section)
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    arguments.pop("debug")
    artefact = arguments.pop("artefact")
    names = [name for name in ServeOptions.__dataclass_fields__ if name in arguments]
    options = flags.merge(ServeOptions(), {name: arguments.pop(name) for name in names}, "flags")
    engine_options = flags.merge(EngineOptions(), arguments, "flags")
    try:
        import uvicorn

        from .app import create_app
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "fastapi", "server") from error
    name = Path(artefact).resolve().name.removesuffix(".gguf")
    app = create_app(load(artefact, engine_options), name, options.api_key, options.waiting)
    print(f"model {name!r} at http://{options.host}:{options.port}/v1 (documentation: /docs)", flush=True)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
    return 0


def main() -> None:
    sys.exit(run_command(body))
