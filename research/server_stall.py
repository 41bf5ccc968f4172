"""Measure how a long prompt delays another answer: `python -m research.server_stall http://127.0.0.1:8000/v1 ...`.

One client reads a streamed answer, and another sends a long prompt in the middle of it. The result is the pauses
between the pieces of the answer before the prompt and during its evaluation, and the time of the prompt. The endpoints
are measured in turn. Any server with OpenAI's API can be measured.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.base.extras import extra
from efficientllm.runtime.base.quantities import Figure, markdown_table

from .server_load import has_text

if TYPE_CHECKING:
    import httpx

STORY = "Tell a long story about lighthouse keeper number {number}."
SENTENCE = "Keeper {number} wrote of ship {count} in the book of the tower. "


@dataclass(frozen=True)
class StallOptions:
    """Measurement."""

    rounds: int = flags.number(5, at_least=1)
    """Disturbed answers per endpoint."""
    tokens: int = flags.number(160, at_least=1)
    """Most tokens of the disturbed answer."""
    undisturbed: int = flags.number(32, at_least=2)
    """Pieces of the answer before the prompt is sent."""
    sentences: int = flags.number(80, at_least=1)
    """Sentences of the long prompt, about 17 tokens each."""
    model: str = "model"
    """Name of the model in the requests."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        flags.require(self, "undisturbed", self.undisturbed < self.tokens, "must be below --tokens")


@dataclass(frozen=True)
class DisturbedAnswer:
    """Times of one answer, in seconds."""

    before: tuple[float, ...]
    """Pauses between pieces before the prompt was sent."""
    during: tuple[float, ...]
    """Pauses from then until the prompt was answered."""
    prompt: float
    """Time from the long prompt to its answer of one token."""


async def disturb(address: str, options: StallOptions, number: int) -> DisturbedAnswer:
    """Read one answer, send a long prompt during it, and return the times."""
    with extra("bench"):
        import httpx
    arrivals: list[float] = []
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        story: dict[str, Any] = _body(options, STORY.format(number=number), options.tokens) | {"stream": True}
        other: asyncio.Task[tuple[float, float]] | None = None
        async with client.stream("POST", "chat/completions", json=story) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {") and has_text(json.loads(line[6:])):
                    arrivals.append(time.perf_counter())
                if len(arrivals) == options.undisturbed and other is None:
                    other = asyncio.create_task(_send_long_prompt(client, options, number))
        if other is None:  # the answer was too short
            return DisturbedAnswer((), (), 0.0)
        began, ended = await other
    pauses = [(end, end - start) for start, end in itertools.pairwise(arrivals)]
    before = tuple(pause for end, pause in pauses if end <= began)
    during = tuple(pause for end, pause in pauses if began < end and end - pause < ended)
    return DisturbedAnswer(before, during, ended - began)


async def _send_long_prompt(client: httpx.AsyncClient, options: StallOptions, number: int) -> tuple[float, float]:
    """Send the long prompt and return the times at which it was sent and answered."""
    text = "".join(SENTENCE.format(number=number, count=count) for count in range(options.sentences))
    began = time.perf_counter()
    answer = await client.post("chat/completions", json=_body(options, text, 1))
    answer.raise_for_status()
    return began, time.perf_counter()


def _body(options: StallOptions, text: str, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": options.model, "messages": messages, "max_tokens": tokens, "temperature": 0}


def compare(addresses: Sequence[str], options: StallOptions) -> list[list[str]]:
    """Return a header and a row for each endpoint."""
    answers: dict[str, list[DisturbedAnswer]] = {address: [] for address in addresses}
    with extra("bench"):
        import httpx
    for number in range(options.rounds):
        for address in addresses:
            try:
                answers[address].append(asyncio.run(disturb(address, options, number)))
            except httpx.HTTPError as error:
                raise UsageError(f"{address}: {error}") from error
    header = ["endpoint", "answers", "pause before, ms", "meanwhile, ms", "longest, ms", "long prompt, s"]
    return [header, *(_row(address, each) for address, each in answers.items())]


def _row(address: str, answers: Sequence[DisturbedAnswer]) -> list[str]:
    complete = [answer for answer in answers if answer.before and answer.during]
    if not complete:
        return [address, "0", "", "", "", ""]
    before_ms = Figure.of([1000 * pause for answer in complete for pause in answer.before])
    during_ms = Figure.of([1000 * pause for answer in complete for pause in answer.during])
    longest_ms = Figure.of([1000 * max(answer.during) for answer in complete])
    prompt = Figure.of([answer.prompt for answer in complete])
    figures = [before_ms.describe(1), during_ms.describe(1), longest_ms.describe(0), prompt.describe(2)]
    return [address, str(len(complete)), *figures]


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(
        StallOptions,
        prog="python -m research.server_stall",
        description="Measure how long an answer pauses while another client's long prompt is evaluated.",
    )
    parser.add_argument("addresses", nargs="+", metavar="URL", help="base URL of an OpenAI-style endpoint")
    arguments = parser.parse(argv)
    addresses = arguments.pop("addresses")
    print(markdown_table(compare(addresses, flags.take(arguments, StallOptions))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
