"""A server that is used hard: `python tests/tools/soak.py ARTEFACT`, with figures of what was lost, crossed and leaked.

Clients go away in every phase of an answer, timed until its place is free; then a crowd asks. Every client of the crowd
biases its answer to one token, so an answer that reached somebody else would show.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from serving import serve

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.quantities import Figure
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.server.models.pool import ModelPool
from efficientllm.server.options import AppOptions

LONG = 900
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


@dataclass(frozen=True)
class Crowd:
    """What became of a crowd's requests."""

    statuses: Counter[int]
    lost: int
    """Requests whose connection broke."""
    crossed: int
    """Answers that hold another client's token."""
    rss_bytes: list[int]
    """Resident memory of the server along the way."""
    seconds: float


async def crowd(
    address: str, models: Sequence[str], tokens: Sequence[tuple[int, str]], requests: int, seconds: float
) -> Crowd:
    """One client for each of `tokens` (id, text); they ask any of `models` until it was often and long enough."""
    statuses, lost, crossed, memory, began = Counter[int](), 0, 0, list[int](), time.perf_counter()

    async def ask(client: httpx.AsyncClient, token: int, text: str) -> None:
        nonlocal lost, crossed
        while sum(statuses.values()) < requests or time.perf_counter() - began < seconds:
            count = random.randint(1, 8)
            body = {"model": random.choice(models), "prompt": [token] * random.randint(1, 40), "max_tokens": count}
            body |= {"logit_bias": {str(token): 100}, "temperature": 0}
            try:
                answer = await client.post("completions", json=body)
            except httpx.TransportError:
                lost += 1
                continue
            statuses[answer.status_code] += 1
            crossed += answer.status_code == 200 and answer.json()["choices"][0]["text"] != text * count

    async def watch(client: httpx.AsyncClient) -> None:
        while True:
            memory.append((await client.get(f"{address}/health")).json()["rss_bytes"])
            await asyncio.sleep(max(0.2, seconds / 20))

    limits = httpx.Limits(max_connections=len(tokens) + 1)
    async with httpx.AsyncClient(base_url=f"{address}/v1/", timeout=600, limits=limits) as client:
        watching = asyncio.ensure_future(watch(client))
        await asyncio.gather(*[ask(client, token, text) for token, text in tokens])
        watching.cancel()
        await asyncio.wait({watching})
    return Crowd(statuses, lost, crossed, memory, time.perf_counter() - began)


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
    engine_options = EngineOptions(options.threads, context=1024, parallel=4)
    engine = load_engine(artefacts[0], engine_options)
    tokens = distinct_tokens(engine)
    engine.close()
    names = {"model" if index == 0 else f"model-{index}": artefact for index, artefact in enumerate(artefacts)}
    pool = ModelPool(names, engine_options, waiting=options.clients, max_memory=options.max_memory)
    with serve(pool, AppOptions()) as address:
        if options.cancellations:
            asyncio.run(print_cancellations(address, pool, tokens, options.cancellations))
        clients = [(token, text) for text, token in tokens.items()][: options.clients]
        found = asyncio.run(crowd(address, list(names), clients, options.requests, 60 * options.minutes))
    answered = ", ".join(f"{count} x {status}" for status, count in sorted(found.statuses.items()))
    print(f"{options.clients} clients, {found.seconds:.0f} s: {answered}; {found.lost} lost, {found.crossed} crossed")
    shown = ", ".join(f"{value / 1e6:.1f}" for value in found.rss_bytes[:: max(1, len(found.rss_bytes) // 10)])
    print(f"resident memory along the way, MB: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
