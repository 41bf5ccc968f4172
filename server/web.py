"""`efficientllm-serve-web`: a folder of `efficientllm-export --target web` over HTTP, with the headers it needs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..runtime.base import flags
from ..runtime.base.command import run_command
from ..runtime.base.errors import ArtefactError, UsageError

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}
"""The first two isolate the page, for which browsers give it threads, exact clocks and its own memory's size."""


@dataclass(frozen=True)
class WebServerOptions:
    """server"""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in. Browsers keep pages for use offline from this machine's own
    address and over HTTPS only."""
    port: int = flags.number(8080, at_least=0, at_most=65535)
    """Port to listen on; 0: any free one."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


class WebHandler(SimpleHTTPRequestHandler):
    """Files of one folder; a list of its files is given to nobody."""

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
        """A visit is nobody's business."""


def web_server(folder: Path, options: WebServerOptions | None = None) -> ThreadingHTTPServer:
    """A server of `folder` that listens already; ArtefactError where it holds no page, UsageError for a taken port."""
    options = options or WebServerOptions()
    if not (folder / "index.html").is_file():
        raise ArtefactError(f"{folder} holds no page; write one with efficientllm-export --target web")
    handler = functools.partial(WebHandler, directory=str(folder))
    try:
        return ThreadingHTTPServer((options.host, options.port), handler)
    except OSError as error:
        raise UsageError(
            f"--host {options.host} --port {options.port}: cannot be listened on: {error.strerror}"
        ) from error


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        WebServerOptions,
        prog="efficientllm-serve-web",
        description="Serve a folder of efficientllm-export --target web, and isolate the page from others.",
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


def main() -> None:
    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
