"""`efficientllm-serve`: artefacts behind an OpenAI-style endpoint and a chat page.

How the server stops: answers in progress have some seconds to end, and what has not ended then is told why.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from ..runtime.base import flags
from ..runtime.base.command import run_command
from ..runtime.base.errors import UsageError
from ..runtime.base.extras import extra
from ..runtime.engines.engine import EngineOptions
from .access.guard import LOCAL_HOSTS
from .answers.choices import SamplingDefaults


@dataclass(frozen=True)
class ServeOptions:
    """server"""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = flags.number(8000, at_least=1, at_most=65535)
    """Port to listen on."""
    model: tuple[str, ...] = ()
    """A further model, NAME=PATH, repeatable; loaded when it is first asked for."""
    max_memory: int = flags.byte_count(0)
    """Unload the least recently used models above this many bytes, such as 2GB; 0: keep all."""
    waiting: int = flags.number(8, at_least=0)
    """Requests per model that may wait behind the one being answered; more are refused with 429."""
    timeout: float = flags.number(600.0, above=0)
    """Seconds a request may take, the wait included."""
    grace: int = flags.number(10, at_least=0)
    """Seconds that answers in progress have at shutdown."""
    max_connections: int = flags.number(512, at_least=1)
    """Connections at once, those that send nothing included; a process may have 1024 files open on most systems."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
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


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that nobody else listens on; UsageError where the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # the protocol must be named: asyncio sends small pieces at once (TCP_NODELAY) only where it knows that it is TCP
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"--port {port}: another program listens there on {host}; give another --port") from error
        raise UsageError(f"--host {host} --port {port}: cannot be listened on: {error.strerror}") from error
    return listener


def body(argv: Sequence[str]) -> int:
    with extra("server"):
        from .access.connections import KEEP_ALIVE_SECONDS, limited_protocol
        from .app import AppOptions, create_app
        from .models.pool import ModelPool
    sections = (ServeOptions, AppOptions, SamplingDefaults, EngineOptions)
    arguments = build_parser(sections).parse(argv)
    artefact = arguments.pop("artefact")
    options, app_options = flags.take(arguments, ServeOptions), flags.take(arguments, AppOptions)
    engine_options, sampling = flags.take(arguments, EngineOptions), flags.take(arguments, SamplingDefaults)
    artefacts = named_artefacts(artefact, options.model)
    is_local = options.host in LOCAL_HOSTS
    if not app_options.key and not is_local:
        reason = f"--host {options.host} may let other machines in, and there is no --api-key"
        print(f"warning: {reason}: whoever reaches the port may use it", file=sys.stderr)
    with bound_socket(options.host, options.port) as listener:  # before the models take their time to load
        pool = ModelPool(artefacts, engine_options, options.waiting, options.timeout, options.max_memory)
        names = ", ".join(artefacts)
        print(f"{names} at http://{options.host}:{options.port}/v1 (chat: /, documentation: /docs)", flush=True)
        app = create_app(pool, app_options, is_local, sampling)
        protocol = limited_protocol(options.max_connections, app_options.body_timeout)
        settings = {"http": protocol, "log_level": "warning", "timeout_keep_alive": KEEP_ALIVE_SECONDS}
        StoppingServer(app, pool.abort, options.grace, **settings).run(sockets=[listener])
    return 0


def main() -> None:
    sys.exit(run_command(body))


AFTER_THAT = 5
"""Seconds that clients have to read why their answers end, before uvicorn cuts their connections."""


class StoppingServer(uvicorn.Server):
    """uvicorn's server, which by itself would cancel what goes on in the middle of a response."""

    def __init__(self, app: Any, end_answers: Callable[[], None], grace: float, **settings: Any) -> None:
        """`grace`: seconds between the signal and `end_answers`."""
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=int(grace) + AFTER_THAT, **settings))
        self._end_answers, self._grace = end_answers, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._grace, self._end_answers)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


if __name__ == "__main__":
    main()
