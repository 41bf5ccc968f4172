"""Measure endpoints under load: `python -m research.server_load http://127.0.0.1:8000/v1 http://127.0.0.1:8081/v1`.

Clients send the same questions to every endpoint and read greedy, streamed answers. Each client sends its next question
after an answer. Short questions share nearly all of their text. With --words, every prompt begins with a text of its
own. The endpoints are measured in turn, so that drift of the machine affects all of them. Any server with OpenAI's API
can be measured.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.quantities import Figure, markdown_table

QUESTION = "Tell a story about lighthouse keeper number {number}."
TEXTS = Path(__file__).parents[1] / "train/evaluation/quality/texts.jsonl"

FILL_WORDS = 700
"""Words of the prompts that fill the caches, about 1,000 tokens."""
WORDS_APART = 29
"""Distance of the beginnings of two texts of prompts."""


@dataclass(frozen=True)
class LoadOptions:
    """Measurement."""

    clients: tuple[int, ...] = flags.whole_numbers(1, 4, 8, 16, at_least=1)
    """Concurrent clients."""
    requests: int = flags.number(3, at_least=1)
    """Answers per client and round."""
    rounds: int = flags.number(3, at_least=1)
    """Rounds. Each measures every endpoint once."""
    words: tuple[int, ...] = flags.whole_numbers(0, at_least=0)
    """Words of the own text of every prompt; 0: a short question, which differs only in its number."""
    first: int = 0
    """Number of the first question. Questions that a server knows from an earlier measurement are in its cache."""
    fill: int = flags.number(0, at_least=0)
    """Prompts of about 1,000 tokens that every endpoint evaluates before each of its measurements."""
    tokens: int = flags.number(24, at_least=1)
    """Most tokens of an answer."""
    model: tuple[str, ...] = flags.comma_separated("model")
    """Names of models. The clients take them in turn."""
    api_key: str = ""
    """API key of the endpoints."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        for name in ("clients", "words"):
            flags.require(self, name, bool(getattr(self, name)), "give at least one number")


@dataclass(frozen=True)
class AnswerTimes:
    """Times of one answer."""

    first_token_s: float
    """From the request to the first text, 0 if there was none."""
    tokens: int
    prompt_tokens: int
    whole_s: float


@dataclass(frozen=True)
class RoundResult:
    """The answers of one endpoint to a number of clients in one round."""

    answers: tuple[AnswerTimes, ...]
    lost: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Return the throughput of all clients together."""
        return sum(answer.tokens for answer in self.answers) / self.seconds


@functools.cache
def all_words() -> list[str]:
    """Return the words of the quality texts of this repository."""
    texts: list[str] = [json.loads(line)["text"] for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    return [word for text in texts for word in text.split()]


def question(number: int, words: int) -> str:
    """Return question `number`, which begins with `words` words that no other question begins with."""
    if not words:
        return QUESTION.format(number=number)
    every = all_words()
    begin = number * WORDS_APART % len(every)
    text = " ".join(every[(begin + index) % len(every)] for index in range(words))
    return f"{text}\n\nContinue."


async def time_answer(client: httpx.AsyncClient, options: LoadOptions, text: str, asker: int = 0) -> AnswerTimes:
    """Read one streamed answer to the question `text` of a client by its number, and return its times."""
    body: dict[str, Any] = {
        "model": options.model[asker % len(options.model)],
        "messages": [{"role": "user", "content": text}],
        "max_tokens": options.tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, usage = time.perf_counter(), 0.0, dict[str, int]()
    async with client.stream("POST", "chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if not first and has_text(event):
                first = time.perf_counter() - began
            usage = event.get("usage") or usage
    tokens, prompt_tokens = usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0)
    return AnswerTimes(first, tokens, prompt_tokens, time.perf_counter() - began)


def has_text(event: Mapping[str, Any]) -> bool:
    """Return whether an event of a stream carries text of the answer."""
    return any(choice["delta"].get("content") for choice in event["choices"])


async def load(address: str, options: LoadOptions, clients: int, words: int, first_number: int) -> RoundResult:
    """Send `options.requests` different questions from each of `clients` concurrent clients."""
    answers: list[AnswerTimes] = []
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    limits = httpx.Limits(max_connections=clients)

    async def send_all(client: httpx.AsyncClient, index: int) -> None:
        for turn in range(options.requests):
            try:
                text = question(first_number + index * options.requests + turn, words)
                answers.append(await time_answer(client, options, text, index))
            except (httpx.HTTPError, ValueError):
                continue

    async with httpx.AsyncClient(base_url=address, timeout=600, headers=headers, limits=limits) as client:
        if options.fill:
            one_token = replace(options, tokens=1)
            numbers = range(-first_number - options.fill, -first_number)  # other texts in every round
            await asyncio.gather(*[time_answer(client, one_token, question(each, FILL_WORDS)) for each in numbers])
        began = time.perf_counter()
        await asyncio.gather(*[send_all(client, index) for index in range(clients)])
        seconds = time.perf_counter() - began
    return RoundResult(tuple(answers), clients * options.requests - len(answers), seconds)


def compare(addresses: Sequence[str], options: LoadOptions) -> list[list[str]]:
    """Return a header and a row for each number of clients and endpoint."""
    results: dict[tuple[int, int, str], list[RoundResult]] = {}
    number = options.first
    for _ in range(options.rounds):
        for words, clients in itertools.product(options.words, options.clients):
            for address in addresses:
                result = asyncio.run(load(address, options, clients, words, number))
                results.setdefault((words, clients, address), []).append(result)
            number += clients * options.requests  # the same questions to all endpoints, new ones in every round
    header = ["prompt", "clients", "endpoint", "tokens/s, all", "first token p50, s", "p95, s", "answers", "lost"]
    return [header, *(_row(clients, address, rounds) for (_, clients, address), rounds in sorted(results.items()))]


def _row(clients: int, address: str, rounds: Sequence[RoundResult]) -> list[str]:
    prompts = [answer.prompt_tokens for one in rounds for answer in one.answers]
    speed = Figure.of([one.tokens_per_second for one in rounds])
    firsts = sorted(answer.first_token_s for one in rounds for answer in one.answers if answer.first_token_s) or [0.0]
    shown = (f"{firsts[int(share * (len(firsts) - 1))]:.3f}" for share in (0.5, 0.95))
    lost = sum(one.lost for one in rounds)
    speeds = f"{speed.median:.1f} ({speed.low:.1f}-{speed.high:.1f})"
    prompt = f"{sum(prompts) / max(1, len(prompts)):.0f} tokens"
    return [prompt, str(clients), address, speeds, *shown, str(sum(len(one.answers) for one in rounds)), str(lost)]


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(LoadOptions, prog="python -m research.server_load", description=__doc__)
    parser.add_argument("address", nargs="+", help="base address of an endpoint, such as http://127.0.0.1:8000/v1")
    arguments = parser.parse(argv)
    addresses = [address.rstrip("/") + "/" for address in arguments.pop("address")]
    print(markdown_table(compare(addresses, flags.take(arguments, LoadOptions))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
