"""What the server costs: `python -m efficientllm.server.benchmark ARTEFACT`.

The same prompts are answered by the engine in this process and by a server in a child process, in turn; the
second turn of a chat is timed with and without its cached beginning; then the server's memory is watched over many
short requests.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from ..runtime.base.errors import ArtefactError
from ..runtime.engines.engine import Engine, EngineOptions, load_engine
from ..runtime.generation import Generation, chat_prompt
from ..runtime.sampling import SamplingOptions

START_SECONDS = 120
TEXT = "Tell a story about a lighthouse keeper, number {number}."


@dataclass(frozen=True)
class Timing:
    """One answer."""

    first_token_ms: float
    decode_tokens_per_second: float


@contextmanager
def served(artefact: str, threads: int, context: int) -> Iterator[str]:
    """Address of a server of `artefact` in a child process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from efficientllm.server.cli import main; main()"]
    command += [
        "--model",
        f"model={artefact}",
        "--port",
        str(port),
        "--threads",
        str(threads),
        "--context",
        str(context),
    ]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while True:
            if child.poll() is not None or time.monotonic() > deadline:
                lines = child.stderr.read().splitlines() if child.stderr and child.poll() is not None else []
                raise ArtefactError(lines[-1] if lines else "the server did not start")
            try:
                httpx.get(f"{address}/health").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield address
    finally:
        child.terminate()
        child.wait()


def timing(began: float, arrivals: list[float]) -> Timing:
    return Timing(1000 * (arrivals[0] - began), (len(arrivals) - 1) / (arrivals[-1] - arrivals[0]))


def ask_engine(engine: Engine, text: str, tokens: int) -> Timing:
    began, arrivals = time.perf_counter(), []
    prompt = chat_prompt(engine, [{"role": "user", "content": text}])
    for _ in Generation(engine, prompt, tokens, SamplingOptions(), []):
        arrivals.append(time.perf_counter())
    return timing(began, arrivals)


def ask_server(client: httpx.Client, text: str, tokens: int) -> Timing:
    body = {"model": "model", "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    body |= {"temperature": 0, "stream": True}
    began, arrivals = time.perf_counter(), []
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                arrivals.append(time.perf_counter())
    return timing(began, arrivals)


def overhead(artefact: str, threads: int, rounds: int, tokens: int) -> None:
    """Print both sides' medians and the median difference of the pairs."""
    engine = load_engine(artefact, EngineOptions(threads=threads, context=1024))
    pairs = []
    with served(artefact, threads, 1024) as address, httpx.Client(base_url=address, timeout=600) as client:
        for number in range(rounds + 1):
            text = TEXT.format(number=number)
            sides = [lambda: ask_engine(engine, text, tokens), lambda: ask_server(client, text, tokens)]  # noqa: B023
            timings = [side() for side in (sides if number % 2 else sides[::-1])]
            if number:  # the first pair warms up
                pairs.append(timings if number % 2 else timings[::-1])
    engine.close()
    for index, name in enumerate(("engine", "server")):
        print(
            f"{name}: time to first token {spread([pair[index].first_token_ms for pair in pairs], 'ms')}, "
            f"decode {spread([pair[index].decode_tokens_per_second for pair in pairs], 'tokens/s')}"
        )
    added = [alone.first_token_ms for alone, _ in pairs], [with_server.first_token_ms for _, with_server in pairs]
    shares = [100 * (1 - b.decode_tokens_per_second / a.decode_tokens_per_second) for a, b in pairs]
    print(f"added to the first token: {spread([b - a for a, b in zip(*added, strict=True)], 'ms')}")
    print(f"lost of decode speed: {spread(shares, '%')}")


def prefix_reuse(artefact: str, threads: int, rounds: int) -> None:
    """Print the time to the first token of a chat's second turn, with the first one cached and without."""
    engine = load_engine(artefact, EngineOptions(threads=threads, context=1024, warm_up=True))
    times: tuple[list[float], list[float]] = ([], [])
    long: list[int] = []
    for number in range(rounds):
        first = [{"role": "user", "content": f"{number}. " + "The lighthouse stands on a rock in the sea. " * 30}]
        turns = [*first, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Who keeps it?"}]
        short, long = chat_prompt(engine, first), chat_prompt(engine, turns)
        for index, before in enumerate((short, [number])):
            engine.prefill(before)
            began = time.perf_counter()
            engine.prefill(long)
            times[index].append(1000 * (time.perf_counter() - began))
    engine.close()
    print(f"second turn of {len(long)} tokens: cached {spread(times[0], 'ms')}, from scratch {spread(times[1], 'ms')}")


def spread(values: list[float], unit: str) -> str:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.1f} {unit} ({low:.1f} to {high:.1f}, n = {len(values)})"


def memory(artefact: str, threads: int, requests: int) -> None:
    """Print the server's allocations along `requests` short requests."""
    with served(artefact, threads, 1024) as address, httpx.Client(base_url=address, timeout=600) as client:
        for number in range(requests + 1):
            if number in (0, requests // 10) or (number and number % (requests // 5) == 0):
                anonymous = client.get("/health").json()["rss_anon_bytes"]
                print(f"after {number:>6} requests: {anonymous / 1e6:.1f} MB allocated", flush=True)
            if number < requests:
                body = {"model": "model", "messages": [{"role": "user", "content": f"Hi {number}"}], "max_tokens": 4}
                client.post("/v1/chat/completions", json=body).raise_for_status()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m efficientllm.server.benchmark", description=__doc__)
    parser.add_argument("artefact")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20, help="pairs of answers [20]")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per answer [128]")
    parser.add_argument("--requests", type=int, default=0, help="short requests of the memory run [0]")
    arguments = parser.parse_args()
    overhead(arguments.artefact, arguments.threads, arguments.rounds, arguments.tokens)
    prefix_reuse(arguments.artefact, arguments.threads, arguments.rounds)
    if arguments.requests:
        memory(arguments.artefact, arguments.threads, arguments.requests)


if __name__ == "__main__":
    main()
