"""`efficientllm-serve-web`: serve a folder of `efficientllm-export --target web` with the headers that it needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..runtime.base import flags
from ..runtime.base.errors import ArtefactError, UsageError

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}
"""The first two isolate the page. Only isolated pages have threads, exact clocks and the size of their memory."""


@dataclass(frozen=True)
class WebServerOptions:
    """Server."""

    host: str = "127.0.0.1"
    """Address to listen on. With 0.0.0.0 other machines can reach the server, but browsers keep pages for offline use
    only from a local address or over HTTPS."""
    port: int = flags.number(8080, at_least=0, at_most=65535)
    """Port to listen on; 0: any free one."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        flags.require(self, "host", bool(self.host), "must not be empty; 0.0.0.0 means all addresses", value="''")


class WebHandler(SimpleHTTPRequestHandler):
    """Serves the files of one folder, but not a list of them."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".webmanifest": "application/manifest+json",
        ".part": "application/octet-stream",
    }

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: object) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def web_server(folder: Path, options: WebServerOptions | None = None) -> ThreadingHTTPServer:
    """Return a server of `folder` that is listening. ArtefactError without a page, UsageError if it cannot listen."""
    options = options or WebServerOptions()
    if not (folder / "index.html").is_file():
        raise ArtefactError(f"{folder} has no index.html; write a page with efficientllm-export --target web")
    handler = functools.partial(WebHandler, directory=str(folder))
    try:
        return ThreadingHTTPServer((options.host, options.port), handler)
    except OSError as error:
        raise UsageError(
            f"--host {options.host} --port {options.port}: cannot listen: {error.strerror}; choose another address"
        ) from error


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        WebServerOptions,
        prog="efficientllm-serve-web",
        examples=("serve-web small-web", "serve-web small-web --port 8080"),
        description="Serve a folder of efficientllm-export --target web with the headers that isolate its page.",
    )
    parser.add_argument("folder", help="folder written by efficientllm-export --target web")
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    folder = Path(arguments.pop("folder"))
    with web_server(folder, flags.take(arguments, WebServerOptions)) as server:
        print(f"http://{server.server_address[0]}:{server.server_port}/", flush=True)
        server.serve_forever()
    return 0
