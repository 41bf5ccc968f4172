"""A server that is used hard: `python tests/tools/soak.py ARTEFACT`, with figures of what was lost, crossed and leaked.

Cancellations are timed on the server's own worker, in every phase of an answer; the crowd asks a real server over HTTP.
Every client of the crowd biases its answer to one token, so an answer that reached somebody else would show.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from serving import serve

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.figure import Figure
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.owned import OwnedEngine
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.grammar import Grammar, GrammarConstraint
from efficientllm.server.app import AppOptions
from efficientllm.server.models.pool import ModelPool
from efficientllm.server.models.worker import EngineWorker, Piece

LONG = 200
"""Tokens of an answer that would go on."""


@dataclass(frozen=True)
class SoakOptions:
    """soak"""

    clients: int = 32
    """Clients of the crowd."""
    requests: int = 10_000
    """Answers that they read together at least."""
    minutes: float = 10.0
    """How long they go on at least."""
    cancellations: int = 1000
    """Answers that are cancelled."""
    threads: int = 1
    """CPU threads."""

    def __post_init__(self) -> None:
        flags.check_types(self)
        flags.require(self, "clients", self.clients >= 1, "must be positive")


def _forever(engine: OwnedEngine, prompt: Sequence[int], **options: object) -> Generation:
    """An answer that no end token ends."""
    biases = dict.fromkeys(engine.end_ids, float("-inf"))
    return Generation(engine, prompt, AnswerOptions(LONG, logit_bias=biases, **options))  # type: ignore[arg-type]


def _held_back(engine: OwnedEngine) -> Generation:
    """Whose text may become a stop string for ever."""
    token = next(token for token in range(engine.vocab_size) if engine.token_bytes(token).isalpha())
    stop = engine.token_bytes(token).decode() * 2 * LONG
    return Generation(engine, [token] * 8, AnswerOptions(LONG, stop=[stop], logit_bias={token: 1000.0}))


def _json(engine: OwnedEngine) -> Generation:
    return Generation(engine, [5, 6, 7], AnswerOptions(LONG), GrammarConstraint(engine, Grammar.json_object()))


PHASES: dict[str, Callable[[OwnedEngine], Generation]] = {
    "prompt": lambda engine: _forever(
        engine, [random.randrange(5, 300) for _ in range(engine.context_length * 3 // 4)]
    ),
    "answer": lambda engine: _forever(engine, [5, 6, 7]),
    "held back": _held_back,
    "JSON": _json,
    "waiting": lambda engine: _forever(engine, [8, 9]),
}
"""What an answer does when it is cancelled -> one that does it."""


async def cancel_one(worker: EngineWorker, phase: str) -> float:
    """Seconds until the place of an answer that was cancelled in `phase` is free."""
    others: list[AsyncGenerator[Piece]] = []
    if phase == "waiting":  # for all sequences, which others have
        others = [_begin(worker, _forever(worker.engine, [5, index])) for index in range(worker.engine.num_sequences)]
    places = worker.in_flight
    answer = _begin(worker, PHASES[phase](worker.engine))
    first = asyncio.ensure_future(anext(answer, None))
    if phase == "answer":
        await first
    else:
        await asyncio.sleep(random.uniform(0, 0.05))
    began = time.perf_counter()
    first.cancel()
    await asyncio.wait({first})
    await answer.aclose()
    while worker.in_flight > places:
        await asyncio.sleep(0.0005)
    taken = time.perf_counter() - began
    for other in others:
        await _leave(other)
    while worker.in_flight:
        await asyncio.sleep(0.0005)
    return taken


def _begin(worker: EngineWorker, generation: Generation) -> AsyncGenerator[Piece]:
    worker.enter()
    return worker.stream([generation])


async def _leave(answer: AsyncGenerator[Piece]) -> None:
    await anext(answer, None)  # one that was not begun would not know that it is left
    await answer.aclose()


async def cancellations(engine: OwnedEngine, count: int) -> dict[str, list[float]]:
    """Seconds by phase; closes the engine."""
    worker = EngineWorker(engine, waiting=8, timeout=600, when_idle=lambda: None)
    found: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for number in range(count):
        phase = list(PHASES)[number % len(PHASES)]
        found[phase].append(await cancel_one(worker, phase))
    await asyncio.to_thread(worker.close)
    return found


@dataclass(frozen=True)
class Crowd:
    """What became of a crowd's requests."""

    statuses: Counter[int]
    crossed: int
    """Answers that hold another client's token."""
    rss_bytes: list[int]
    """Resident memory of the server along the way."""
    seconds: float


async def crowd(address: str, tokens: Sequence[tuple[int, str]], requests: int, seconds: float) -> Crowd:
    """One client for each of `tokens` (id, text), which ask until there were enough and the time is over."""
    statuses, crossed, memory, began = Counter[int](), 0, list[int](), time.perf_counter()

    async def ask(client: httpx.AsyncClient, token: int, text: str) -> None:
        nonlocal crossed
        while sum(statuses.values()) < requests or time.perf_counter() - began < seconds:
            count = random.randint(1, 8)
            body = {"model": "model", "prompt": [token] * random.randint(1, 40), "max_tokens": count}
            body |= {"logit_bias": {str(token): 100}, "temperature": 0}
            answer = await client.post("completions", json=body)
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
    return Crowd(statuses, crossed, memory, time.perf_counter() - began)


def distinct_tokens(engine: OwnedEngine, count: int) -> list[tuple[int, str]]:
    """Tokens whose texts tell them apart."""
    texts = ((token, engine.token_bytes(token)) for token in range(engine.vocab_size) if token not in engine.end_ids)
    return [(token, data.decode()) for token, data in texts if len(data) == 1 and data.isalnum()][:count]


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(SoakOptions, prog="python tests/tools/soak.py", description=__doc__)
    parser.add_argument("artefact", help="folder written by efficientllm-export, or a .gguf file")
    arguments = parser.parse(argv)
    artefact, options = arguments.pop("artefact"), flags.take(arguments, SoakOptions)
    engine = load_engine(artefact, EngineOptions(options.threads, 1024, parallel=4))
    tokens = distinct_tokens(engine, options.clients)
    for phase, seconds in asyncio.run(cancellations(engine, options.cancellations)).items():
        figure, worst = Figure.of([1000 * one for one in seconds]), 1000 * max(seconds)
        print(f"cancelled in {phase}: free after {figure.median:.1f} ms (worst of {figure.n}: {worst:.1f})", flush=True)
    pool = ModelPool({"model": str(Path(artefact))}, EngineOptions(options.threads, 1024), waiting=options.clients)
    with serve(pool, AppOptions()) as address:
        found = asyncio.run(crowd(address, tokens, options.requests, 60 * options.minutes))
    answered = ", ".join(f"{count} x {status}" for status, count in sorted(found.statuses.items()))
    print(f"{options.clients} clients, {found.seconds:.0f} s: {answered}; {found.crossed} crossed")
    shown = ", ".join(f"{value / 1e6:.1f}" for value in found.rss_bytes[:: max(1, len(found.rss_bytes) // 10)])
    print(f"resident memory along the way, MB: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
