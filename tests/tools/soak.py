"""A server that is used hard: `python tests/tools/soak.py ARTEFACT`, with figures of what was lost, crossed and leaked.

Clients go away in every phase of an answer, timed until its place is free. Then a crowd asks a server in a process of
its own. Every client of the crowd biases its answer to one token, so an answer that reached somebody else would show.
With --hostile, half of the crowd cancels, reads slowly or closes its side of the connection. SIGTERM ends the server
amid the answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
from serving import free_port, loaded_pool, serve  # isort: skip

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.quantities import Figure
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.server.models.pool import ModelPool
from efficientllm.server.models.pool_options import PoolOptions
from efficientllm.server.options import AppOptions

LONG = 3000
"""Tokens of an answer that would go on."""

LONG_STRING = {"type": "object", "properties": {"text": {"type": "string", "minLength": LONG}}, "required": ["text"]}

PROMPT = 600
"""Tokens of a prompt that takes long."""


@dataclass(frozen=True)
class SoakOptions:
    """soak"""

    clients: int = flags.number(32, at_least=1)
    """Clients of the crowd."""
    requests: int = 10_000
    """Answers that they read together at least."""
    minutes: float = 10.0
    """How long they go on at least."""
    cancellations: int = 1000
    """Answers that are cancelled."""
    threads: int = 1
    """CPU threads."""
    max_memory: int = flags.byte_count(0)
    """Room for the models, as efficientllm-serve's: where it is not enough for all, they take turns."""
    hostile: bool = False
    """Let half of the crowd cancel, read slowly, or close its side of the connection."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


def _long_prompt(tokens: Sequence[int]) -> dict[str, Any]:
    return {"prompt": random.choices(tokens, k=PROMPT)}


PHASES: dict[str, Callable[[Sequence[int]], dict[str, Any]]] = {
    "prompt": _long_prompt,
    "streamed answer": lambda tokens: {"stream": True},
    "whole answer": lambda tokens: {},
    "held back": lambda tokens: {"stop": "#" * LONG, "stream": True},
    "JSON": lambda tokens: {"response_format": {"type": "json_schema", "json_schema": {"schema": LONG_STRING}}},
    "waiting": lambda tokens: {},
}
"""What an answer does when its client goes -> what the client asked for, of tokens of the vocabulary."""


async def cancellations(
    address: str, pool: ModelPool, tokens: dict[str, int], count: int
) -> AsyncGenerator[tuple[str, float]]:
    """(phase, seconds until the place of an answer whose client went is free); `tokens`: of letters and "#"."""
    endless = {"max_tokens": LONG, "temperature": 0, "prompt": [tokens["#"]] * 8, "logit_bias": {str(tokens["#"]): 100}}
    async with httpx.AsyncClient(base_url=f"{address}/v1/", timeout=600) as client:
        for number in range(count):
            phase = list(PHASES)[number % len(PHASES)]
            # the sequences that it waits for are those of answers whose prompts, too, are long
            others = pool.options.parallel if phase == "waiting" else 0
            busy = [await _asked(client, pool, endless | _long_prompt([*tokens.values()])) for _ in range(others)]
            answer = await _asked(client, pool, endless | PHASES[phase]([*tokens.values()]))
            await asyncio.sleep(random.uniform(0, 0.1))
            assert not answer.done()
            began = time.perf_counter()
            answer.cancel()
            while pool.in_flight > others:
                await asyncio.sleep(0.0005)
            yield phase, time.perf_counter() - began
            for other in busy:
                other.cancel()
            while pool.in_flight:
                await asyncio.sleep(0.0005)


async def _asked(client: httpx.AsyncClient, pool: ModelPool, body: dict[str, Any]) -> asyncio.Future[httpx.Response]:
    """A request that has its place in the server."""
    places = pool.in_flight
    asked = asyncio.ensure_future(client.post("completions", json={"model": "model", **body}))
    while pool.in_flight == places:
        assert not asked.done(), asked.result().text
        await asyncio.sleep(0.0005)
    return asked


@dataclass
class Crowd:
    """Outcomes of a crowd's requests."""

    statuses: Counter[int] = field(default_factory=Counter[int])
    lost: int = 0
    """Requests whose connection broke."""
    crossed: int = 0
    """Answers that hold another client's token."""
    cancelled: int = 0
    """Requests whose client went."""
    at_stop: Counter[str] = field(default_factory=Counter[str])
    """Outcomes of requests that were sent before SIGTERM and answered after it."""
    rss_bytes: list[int] = field(default_factory=list[int])
    """Resident memory of the server along the way."""
    seconds: float = 0.0


KINDS = ("plain", "cancels", "plain", "reads slowly", "plain", "half-closed")
"""How the clients of a hostile crowd read, in turn."""

SLOW_BYTES, SLOW_SECONDS = 16, 0.01
"""Bytes that a slow reader takes at once, and its pause after them."""


async def ask_raw(address: str, body: dict[str, Any], kind: str) -> tuple[int, str] | None:
    """Return status and text of an answer that is read in the manner of `kind`, None if it was cancelled."""
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=64)
    try:
        content = json.dumps(body | {"stream": kind != "half-closed"}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        )
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        if kind == "half-closed":
            writer.write_eof()
        if kind == "cancels":
            await asyncio.sleep(random.uniform(0, 0.3))
            return None
        data = b""
        while more := await reader.read(SLOW_BYTES if kind == "reads slowly" else 65536):
            data += more
            if kind == "reads slowly":
                await asyncio.sleep(SLOW_SECONDS)
    finally:
        writer.transport.abort()
    *_, last = data.split(b"HTTP/1.1 ")  # after interim answers
    if not last.strip():
        raise httpx.ReadError("no answer")
    status, rest = int(last[:3]), last.partition(b"\r\n\r\n")[2]
    lines = rest.decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line] if status == 200 else []
    if any("error" in event for event in events):
        return 503, ""
    return status, "".join(choice["text"] for event in events for choice in event["choices"])


async def crowd(
    address: str,
    models: Sequence[str],
    tokens: Sequence[tuple[int, str]],
    requests: int,
    seconds: float,
    kinds: Sequence[str] = ("plain",),
    stop: Callable[[], None] | None = None,
) -> Crowd:
    """One client for each of `tokens` (id, text); they ask any of `models` until it was often and long enough.

    Then `stop` is called amid their answers, if it is given.
    """
    found, began, is_stopped = Crowd(), time.perf_counter(), False

    def is_enough() -> bool:
        return sum(found.statuses.values()) >= requests and time.perf_counter() - began >= seconds

    async def ask(client: httpx.AsyncClient, number: int, token: int, text: str) -> None:
        kind = kinds[number % len(kinds)]
        while not (is_stopped if stop else is_enough()):
            count = random.randint(1, 8)
            body = {"model": random.choice(models), "prompt": [token] * random.randint(1, 40), "max_tokens": count}
            body |= {"logit_bias": {str(token): 100}, "temperature": 0}
            try:
                if kind == "plain":
                    whole = await client.post("completions", json=body)
                    answer = whole.status_code, whole.json()["choices"][0]["text"] if whole.status_code == 200 else ""
                else:
                    answer = await ask_raw(address, body, kind)
            except (httpx.TransportError, OSError):
                if is_stopped:
                    found.at_stop["connection closed"] += 1
                else:
                    found.lost += 1
                continue
            if answer is None:
                found.cancelled += 1
                continue
            status, answered = answer
            if is_stopped:
                found.at_stop[str(status)] += 1
            else:
                found.statuses[status] += 1
            found.crossed += status == 200 and answered != text * count

    async def watch(client: httpx.AsyncClient) -> None:
        while True:
            found.rss_bytes.append((await client.get(f"{address}/health")).json()["rss_bytes"])
            await asyncio.sleep(max(0.2, seconds / 20))

    async def stop_amid() -> None:
        nonlocal is_stopped
        while not is_enough():
            await asyncio.sleep(0.1)
        watching.cancel()
        await asyncio.wait({watching})
        is_stopped = True
        if stop:
            stop()

    limits = httpx.Limits(max_connections=len(tokens) + 1)
    async with httpx.AsyncClient(base_url=f"{address}/v1/", timeout=600, limits=limits) as client:
        watching = asyncio.ensure_future(watch(client))
        asking = [ask(client, number, token, text) for number, (token, text) in enumerate(tokens)]
        await asyncio.gather(stop_amid(), *asking)
    found.seconds = time.perf_counter() - began
    return found


@contextlib.contextmanager
def server_of(
    names: dict[str, str], options: SoakOptions, context: int = 1024
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Serve artefacts by name in a child; yield the address and a function that sends it SIGTERM."""
    port = free_port()
    models = itertools.chain.from_iterable(("--model", f"{name}={artefact}") for name, artefact in names.items())
    command = [
        *(sys.executable, "-m", "efficientllm.runtime.start", "serve", *models, "--port", str(port)),
        *("--threads", str(options.threads), "--context", str(context), "--parallel", "4"),
        *("--waiting", str(options.clients), "--max-memory", str(options.max_memory)),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        address = f"http://127.0.0.1:{port}"
        try:
            while not is_healthy(address):
                assert child.poll() is None
                time.sleep(0.1)
            yield address, child.terminate
        finally:
            child.terminate()


def is_healthy(address: str) -> bool:
    """Return whether the server answers and has loaded its first model."""
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def distinct_tokens(engine: EngineScheduler) -> dict[str, int]:
    """Tokens of letters, digits and "#": their texts tell them apart."""
    texts = ((token, engine.token_bytes(token)) for token in range(engine.vocab_size) if token not in engine.end_ids)
    return {data.decode(): token for token, data in texts if len(data) == 1 and (data.isalnum() or data == b"#")}


async def print_cancellations(address: str, pool: ModelPool, tokens: dict[str, int], count: int) -> None:
    """Time clients that go and say so, phase by phase."""
    found: dict[str, list[float]] = {phase: [] for phase in PHASES}
    async for phase, seconds in cancellations(address, pool, tokens, count):
        found[phase].append(1000 * seconds)
    for phase, times in found.items():
        figure = f"{Figure.of(times).median:.1f} ms (worst of {len(times)}: {max(times):.1f})"
        print(f"client gone, {phase}: place free after {figure}", flush=True)


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(SoakOptions, prog="python tests/tools/soak.py", description=__doc__)
    parser.add_argument("artefact", nargs="+", help="folder written by efficientllm-export, or a .gguf file")
    arguments = parser.parse(argv)
    artefacts, options = arguments.pop("artefact"), flags.take(arguments, SoakOptions)
    engine_options = EngineOptions(options.threads, context=4096, parallel=4)
    engine = load_engine(artefacts[0], engine_options)
    tokens = distinct_tokens(engine)
    engine.close()
    names = {"model" if index == 0 else f"model-{index}": artefact for index, artefact in enumerate(artefacts)}
    if options.cancellations:
        pool = loaded_pool(names, engine_options, PoolOptions(waiting=options.clients, max_memory=options.max_memory))
        with serve(pool, AppOptions()) as address:
            asyncio.run(print_cancellations(address, pool, tokens, options.cancellations))
    clients = [(token, text) for text, token in tokens.items()][: options.clients]
    kinds = KINDS if options.hostile else KINDS[:1]
    with server_of(names, options) as (address, stop):
        asked = crowd(address, list(names), clients, options.requests, 60 * options.minutes, kinds, stop)
        found = asyncio.run(asked)
    answered = ", ".join(f"{count} x {status}" for status, count in sorted(found.statuses.items()))
    print(f"{options.clients} clients, {found.seconds:.0f} s: {answered}; {found.lost} lost, {found.crossed} crossed")
    at_stop = ", ".join(f"{count} x {outcome}" for outcome, count in sorted(found.at_stop.items()))
    print(f"cancelled: {found.cancelled}; amid SIGTERM: {at_stop}")
    shown = ", ".join(f"{value / 1e6:.1f}" for value in found.rss_bytes[:: max(1, len(found.rss_bytes) // 10)])
    print(f"resident memory along the way, MB: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
