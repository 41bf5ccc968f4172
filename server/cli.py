"""`efficientllm-serve`: serve artefacts behind OpenAI's API and a chat page."""

from __future__ import annotations

import errno
import math
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from ..runtime.base import flags
from ..runtime.base.errors import UsageError
from ..runtime.base.extras import extra
from ..runtime.engines.artefact import ARTEFACT_HELP, Artefact, open_or_export
from ..runtime.engines.calibration import CONSTRAINTS
from ..runtime.engines.engine import EngineOptions, find_engine
from ..runtime.engines.memory import use_one_heap
from ..runtime.sampling import SamplingDefaults
from .models.pool_options import PoolOptions
from .options import AppOptions, ServeOptions


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        ServeOptions,
        PoolOptions,
        AppOptions,
        SamplingDefaults,
        EngineOptions,
        prog="efficientllm-serve",
        examples=(
            "serve small-gguf --port 8000",
            "serve --model small=small-gguf --model big=big.gguf --max-memory 2GB",
        ),
        description="Serve exported models to any OpenAI client, with a chat page at /.",
    )
    parser.add_argument("artefact", nargs="?", help=f"{ARTEFACT_HELP}; see also --model")
    return parser


def named_artefacts(artefact: str | None, models: Sequence[str]) -> dict[str, str]:
    """Return {name: path} of all models, `artefact` first. UsageError if there is none or a name is used twice."""
    pairs = []
    if artefact:
        name = Path(artefact).resolve().name.removesuffix(".gguf").removesuffix(".pte")
        pairs.append((name, artefact))
    for text in models:
        name, _, path = text.partition("=")
        pairs.append((name, path))
    if not pairs:
        raise UsageError("give an artefact, or --model NAME=PATH")
    if len(dict(pairs)) < len(pairs):
        raise UsageError(
            f"two models have the same name: {', '.join(name for name, _ in pairs)}; use --model NAME=PATH"
        )
    return dict(pairs)


def check_files(limits: PoolOptions, app_options: AppOptions, engine_options: EngineOptions) -> None:
    """Raise UsageError or ArtefactError for files of flags that are missing, before packages are imported."""
    for path in limits.pin:
        if not Path(path).is_file():
            raise UsageError(f"--pin {path}: no such file; give a text or a .json file with messages")
        if not Path(path).stat().st_size:
            raise UsageError(f"--pin {path}: is empty; write a text or messages into it")
    _ = app_options.keys  # the app finds them read


def check_calibration(artefact: Artefact, options: AppOptions) -> None:
    """Raise UsageError if nothing tells which calls of a model are sure enough."""
    names = ("", *artefact.job_names)
    kinds = {(name, options.tool_arguments) for name in names}
    found = [each for key, each in artefact.calibrations.items() if key in kinds]
    if not found:
        constrain = next(name for name, arguments in CONSTRAINTS.items() if arguments == options.tool_arguments)
        folder = artefact.folder if artefact.known_manifest is not None else "FOLDER"
        command = f"efficientllm-eval {folder} --task FILE --metric call --constrain {constrain} --write"
        raise UsageError(f"--wrong-acts: no score of {artefact.path} has calls of this kind; run {command}")
    if any(math.isinf(each.least(options.wrong_acts)[0]) for each in found):
        least = f"allow {max(min(wrong for _, _, wrong in each.curve) for each in found):.3f}"
        raise UsageError(f"--wrong-acts {options.wrong_acts:g}: the surest calls were wrong more often; {least}")


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address. UsageError if the address is in use or belongs to another machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY, which sends small pieces at once, only on a socket whose protocol is named
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere the option would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"--port {port}: another program listens on it at {host}; choose another --port"
            ) from error
        raise UsageError(
            f"--host {host} --port {port}: cannot listen: {error.strerror}; choose another address"
        ) from error
    return listener


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    artefact = arguments.pop("artefact")
    options, app_options = flags.take(arguments, ServeOptions), flags.take(arguments, AppOptions)
    limits = flags.take(arguments, PoolOptions)
    engine_options, sampling = flags.take(arguments, EngineOptions), flags.take(arguments, SamplingDefaults)
    artefacts = named_artefacts(artefact, options.model)
    check_files(limits, app_options, engine_options)
    for name, path in artefacts.items():
        opened = open_or_export(path)
        find_engine(opened)
        if app_options.wrong_acts < 1:
            check_calibration(opened, app_options)
        artefacts[name] = str(opened.path)
    use_one_heap()  # before threads start
    with bind_socket(options.host, options.port) as listener:  # before packages and models are loaded
        with extra("server"):
            from .access.connections import KEEP_ALIVE_SECONDS, GracefulServer, limited_protocol
            from .access.guard import LOCAL_HOSTS
            from .app import create_app
            from .models.pool import ModelPool
        is_local = options.host in LOCAL_HOSTS
        if not app_options.keys and not is_local:
            reason = f"other machines may reach --host {options.host} and use the server"
            print(f"warning: {reason}; set an --api-key to prevent it", file=sys.stderr)
        pool = ModelPool(artefacts, engine_options, limits)
        names = ", ".join(pool.names)
        print(f"{names} at http://{options.host}:{options.port}/v1 (chat: /, API: /openapi.json)", flush=True)
        app = create_app(pool, app_options, is_local, sampling)
        protocol = limited_protocol(options.max_connections, app_options.body_timeout)
        settings = {"http": protocol, "log_level": "warning", "timeout_keep_alive": KEEP_ALIVE_SECONDS}
        server = GracefulServer(app, pool.load_first, pool.abort, options.grace, **settings)
        server.run(sockets=[listener])
        if server.load_error is not None:
            raise server.load_error
    return 0
