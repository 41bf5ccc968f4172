"""`efficientllm-serve`: artefacts behind an OpenAI-style endpoint and a chat page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.base import flags
from ..runtime.base.command import run_command
from ..runtime.base.errors import UsageError
from ..runtime.base.extras import extra
from ..runtime.engines.engine import EngineOptions


@dataclass(frozen=True)
class ServeOptions:
    """server"""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to listen on."""
    model: tuple[str, ...] = ()
    """A further model, NAME=PATH, repeatable; loaded when it is first asked for."""
    max_memory: int = flags.byte_count(0)
    """Unload the least recently used models above this many bytes, such as 2GB; 0: keep all."""
    waiting: int = 8
    """Requests per model that may wait behind the one being answered; more are refused with 429."""
    timeout: float = 600.0
    """Seconds a request may take, the wait included."""
    grace: int = 10
    """Seconds that answers in progress have at shutdown."""

    def __post_init__(self) -> None:
        flags.require(self, "port", 0 < self.port < 65536, "must be between 1 and 65535")
        flags.require(self, "waiting", self.waiting >= 0, "must not be negative")
        flags.require(self, "timeout", self.timeout > 0, "must be positive")
        for text in self.model:
            flags.require(self, "model", all(text.partition("=")), "must be NAME=PATH", value=text)


def build_parser(sections: Sequence[type]) -> flags.Parser:
    parser = flags.Parser(
        *sections,
        prog="efficientllm-serve",
        description="Serve exported models to any OpenAI client, with a chat page at /.",
    )
    parser.add_argument(
        "artefact", nargs="?", help="folder written by efficientllm-export, or a .gguf or .pte file; see also --model"
    )
    return parser


def named_artefacts(artefact: str | None, models: Sequence[str]) -> dict[str, str]:
    """{name: path}, the first one being loaded at once; UsageError where there is none or a name comes twice."""
    pairs = [(Path(artefact).resolve().name.removesuffix(".gguf").removesuffix(".pte"), artefact)] if artefact else []
    pairs += [(name, path) for name, _, path in (text.partition("=") for text in models)]
    if not pairs:
        raise UsageError("give an artefact, or --model NAME=PATH")
    if len(dict(pairs)) < len(pairs):
        raise UsageError(f"two models have one name: {', '.join(name for name, _ in pairs)}; use --model NAME=PATH")
    return dict(pairs)


def body(argv: Sequence[str]) -> int:
    with extra("server"):
        import uvicorn

        from .app import AppOptions, create_app
        from .pool import ModelPool
    sections = (ServeOptions, AppOptions, EngineOptions)
    arguments = build_parser(sections).parse(argv)
    artefact = arguments.pop("artefact")
    options, app_options = flags.take(arguments, ServeOptions), flags.take(arguments, AppOptions)
    engine_options = flags.take(arguments, EngineOptions)
    artefacts = named_artefacts(artefact, options.model)
    pool = ModelPool(artefacts, engine_options, options.waiting, options.timeout, options.max_memory)
    names = ", ".join(artefacts)
    print(f"{names} at http://{options.host}:{options.port}/v1 (chat: /, documentation: /docs)", flush=True)
    uvicorn.run(
        create_app(pool, app_options),
        host=options.host,
        port=options.port,
        log_level="warning",
        timeout_graceful_shutdown=options.grace,
    )
    return 0


def main() -> None:
    sys.exit(run_command(body))
