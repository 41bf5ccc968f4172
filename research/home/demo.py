"""Try a model in a real Home Assistant, whose devices are those of its demo.

    python -m research.home.demo build/quickstart/home "Turn on the bed light"    # answers, and what changed
    python -m research.home.demo build/quickstart/home                            # until Ctrl-C, with its page

The command serves the artefact and starts Home Assistant in the environment of `make home-assistant`. Without that
environment, it prints the model's call for a small home instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .client import Client, served
from .homes import Entity, Home

HOST = Path(__file__).with_name("host.py")
ENVIRONMENT = Path("build/home-assistant/bin/python")


def print_calls(client: Client, requests: Sequence[str]) -> None:
    """Print the calls or the answer of the model for each request in a small home."""
    home = Home([Entity("Bed Light", "light", "Bedroom", "off"), Entity("Kitchen Lights", "light", "Kitchen", "off")])
    for request in requests:
        messages = [{"role": "system", "content": home.prompt()}, {"role": "user", "content": request}]
        answer, seconds = client.answer(messages, home.all_tools())
        calls = [
            f"{each['function']['name']}({json.dumps(each['function']['arguments'])})"
            for each in answer.get("tool_calls") or ()
        ]
        print(f"{request}\n  {' '.join(calls) or answer['content']}   {1e3 * seconds:.0f} ms")


def main() -> None:
    """Serve the artefact and hand it to Home Assistant."""
    parser = argparse.ArgumentParser(description="Try a model in a real Home Assistant.")
    parser.add_argument("artefact", type=Path)
    parser.add_argument("requests", nargs="*", help="requests to send; none: run until Ctrl-C")
    parser.add_argument("--port", type=int, default=8123, help="port of Home Assistant's page [8123]")
    arguments = parser.parse_args()
    with served(arguments.artefact) as client, contextlib.suppress(KeyboardInterrupt):
        if not ENVIRONMENT.exists():
            print("Home Assistant is not installed (make home-assistant needs Python 3.13); the model's calls:")
            print_calls(client, arguments.requests or ["Turn on the bed light"])
            return
        command = [str(ENVIRONMENT), str(HOST)]
        command += ["ask", *arguments.requests] if arguments.requests else ["serve", "--port", str(arguments.port)]
        raise SystemExit(subprocess.run([*command, "--url", client.url], check=False).returncode)


if __name__ == "__main__":
    main()
