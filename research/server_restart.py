"""Measure starts of the server: `python -m research.server_restart ARTEFACT`.

The first start has an empty cache folder, so the file is new to the machine. Later starts know it. A long prompt is
evaluated once and continued after each restart, with the caches of prompts on disk (--prompt-cache). The time of the
first answer of a new file beyond that of a known one is the time of everything that is measured and stored.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import ArtefactError
from efficientllm.runtime.base.extras import extra
from efficientllm.runtime.base.quantities import markdown_table

from .server_load import question

if TYPE_CHECKING:
    import httpx

PATIENCE_SECONDS = 300


@dataclass(frozen=True)
class RestartOptions:
    """Measurement."""

    threads: int = 1
    """CPU threads; 0: all cores."""
    words: int = flags.number(2060, at_least=1)
    """Words of the long prompt, about 1.4 tokens each."""
    context: int = flags.number(4096, at_least=1)
    """Context window."""
    restarts: int = flags.number(3, at_least=1)
    """Restarts with the stored prompt."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


@dataclass(frozen=True)
class Start:
    """Times of one start, in seconds from the start of the process unless said otherwise."""

    name: str
    listening: float
    """First answer of any kind, such as that the model is being loaded."""
    ready: float
    """The model is loaded."""
    first_answer: float
    """First token of a short question that was sent then."""
    long_prompt: float
    """From the long prompt, sent after that answer, to its first token."""
    prompt_tokens: int
    cached_tokens: int

    @property
    def row(self) -> list[str]:
        """Return the cells of the table."""
        times = (self.listening, self.ready, self.first_answer, self.long_prompt)
        return [self.name, *(f"{each:.2f}" for each in times), str(self.prompt_tokens), str(self.cached_tokens)]


def start(name: str, artefact: str, options: RestartOptions, cache: str) -> Start:
    """Start the server, send the prompts, stop it, and return the times."""
    with extra("bench"):
        import httpx
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "efficientllm.server.cli", "--model", f"model={artefact}", "--port", str(port)),
        *("--threads", str(options.threads), "--context", str(options.context), "--prompt-cache", "2GB"),
    ]
    environment = os.environ | {"EFFICIENTLLM_CACHE": cache}
    began = time.perf_counter()

    def elapsed() -> float:
        return time.perf_counter() - began

    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_SECONDS) as client:
            while True:
                try:
                    client.get("/health")
                    break
                except httpx.TransportError as error:
                    if child.poll() is not None or elapsed() > PATIENCE_SECONDS:
                        raise ArtefactError(f"the server of {artefact} did not start") from error
                    time.sleep(0.01)
            listening = elapsed()
            while client.get("/health").status_code != 200:
                time.sleep(0.01)
            ready = elapsed()
            answer(client, question(0, 0))
            first_answer = elapsed()
            sent = time.perf_counter()
            usage = answer(client, question(1, options.words))
            long_prompt = time.perf_counter() - sent
    finally:
        child.send_signal(signal.SIGTERM)
        child.communicate()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Start(name, listening, ready, first_answer, long_prompt, usage["prompt_tokens"], cached)


def answer(client: httpx.Client, text: str) -> dict[str, Any]:
    """Send a question for an answer of one token, and return its usage."""
    body = {"model": "model", "messages": [{"role": "user", "content": text}], "max_tokens": 1, "temperature": 0}
    found = client.post("/v1/chat/completions", json=body).raise_for_status()
    return found.json()["usage"]


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(RestartOptions, prog="python -m research.server_restart", description=__doc__)
    parser.add_argument("artefact", help="folder written by efficientllm-export, or a .gguf file")
    arguments = parser.parse(argv)
    artefact, options = arguments.pop("artefact"), flags.take(arguments, RestartOptions)
    header = ["start", "listening, s", "loaded, s", "first answer, s", "long prompt's first token, s"]
    with tempfile.TemporaryDirectory() as cache:
        names = ["new file", *(f"restart {number}" for number in range(1, options.restarts + 1))]
        starts = [start(name, artefact, options, cache) for name in names]
    print(markdown_table([[*header, "its tokens", "cached"], *(each.row for each in starts)]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
