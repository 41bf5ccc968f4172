"""Serve an artefact, and ask it through Ollama's API."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 120

FLAGS = ("--tool-arguments", "listed")
"""Flags for a home: names that Home Assistant lists."""


@dataclass
class Client:
    """A model behind Ollama's API."""

    url: str
    model: str
    process: int
    """Process of the server."""

    def answer(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> tuple[Mapping[str, Any], float]:
        """Return the message of the assistant and the seconds that it took.

        Raises RuntimeError with the server's text if it refuses the request.
        """
        options = {"temperature": 0}
        body = {"model": self.model, "messages": messages, "tools": tools, "stream": False, "options": options}
        request = urllib.request.Request(
            f"{self.url}/api/chat", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        began = time.perf_counter()
        try:
            with urllib.request.urlopen(request) as response:
                return json.load(response)["message"], time.perf_counter() - began
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"the server refuses a request: {error.read().decode(errors='replace')}") from error

    def peak_bytes(self) -> int:
        """Return the largest resident memory of the server so far. 0 outside Linux."""
        status = Path(f"/proc/{self.process}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


@contextlib.contextmanager
def served(artefact: Path, flags: Sequence[str] = ()) -> Iterator[Client]:
    """Serve an artefact as the model "home" on a free port, with `FLAGS` and then `flags`.

    Raises SystemExit with the server's error if it ends or does not answer.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "efficientllm.runtime.start", "serve", "--model", f"home={artefact}"]
    command += ["--port", str(port), *FLAGS, *flags]
    with tempfile.TemporaryFile() as errors:
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            if not _is_ready(port, server):
                errors.seek(0)
                raise SystemExit(f"the server did not start: {errors.read().decode(errors='replace').strip()}")
            yield Client(f"http://127.0.0.1:{port}", "home", server.pid)
        finally:
            server.terminate()
            server.wait()


def _is_ready(port: int, server: subprocess.Popen[bytes]) -> bool:
    """Wait until the server answers. Return False if it ends, or after START_SECONDS."""
    until = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                return True
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    return False
