"""Ask a served model for a call: start the server, send a request with `tools`, and print the call.

    python -m research.jobs.ask ARTEFACT TEST "turn on the lamp in the loft"

TEST is test_named.jsonl of the job, whose functions are sent. Free texts in arguments are copied from the request, and
names are those of the home.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

START_SECONDS = 120


def post(port: int, body: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of the server's chat endpoint."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait for the server. Raises SystemExit if it ends or does not answer."""
    until = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main() -> None:
    """Print the request and its call, with the time of a second, warm request."""
    parser = argparse.ArgumentParser(description="Ask a served model for a call.")
    parser.add_argument("artefact", type=Path)
    parser.add_argument("test", type=Path, help="test_named.jsonl of the job")
    parser.add_argument("request")
    arguments = parser.parse_args()
    with arguments.test.open(encoding="utf-8") as rows:
        tools = json.loads(next(rows))["tools"]
    messages = [{"role": "user", "content": arguments.request}]
    body = {"messages": messages, "tools": tools, "tool_arguments": "examples", "temperature": 0, "max_tokens": 96}
    port = free_port()
    command = [sys.executable, "-m", "efficientllm.server.cli", str(arguments.artefact), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(port, server)
        post(port, body)
        began = time.perf_counter()
        answer = post(port, body)["choices"][0]["message"]
        elapsed_ms = 1e3 * (time.perf_counter() - began)
    finally:
        server.terminate()
        server.wait()
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in answer.get("tool_calls") or ()]
    print(f"{arguments.request}\n  {' '.join(calls) or answer['content']}   {elapsed_ms:.0f} ms")


if __name__ == "__main__":
    main()
