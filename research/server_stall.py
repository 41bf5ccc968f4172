"""What a long prompt does to an answer under way: `python -m research.server_stall http://127.0.0.1:8000/v1 ...`.

One client reads a streamed answer; in the middle of it another sends a long prompt. Told are the pauses between the
pieces of the answer before and meanwhile, and how long the prompt took. Endpoints take turns; any OpenAI-style server
can be measured.
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
    """measurement"""

    rounds: int = flags.number(5, at_least=1)
    """Answers that are disturbed, of each endpoint."""
    tokens: int = flags.number(160, at_least=1)
    """Longest answer."""
    undisturbed: int = flags.number(32, at_least=2)
    """Pieces of it that are read before the prompt is sent."""
    sentences: int = flags.number(80, at_least=1)
    """Of the long prompt, some 17 tokens each."""
    model: str = "model"
    """Name of the model in the requests."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        flags.require(self, "undisturbed", self.undisturbed < self.tokens, "must be below --tokens")


@dataclass(frozen=True)
class Disturbed:
    """One answer; seconds."""

    before: tuple[float, ...]
    """Pauses between pieces before the prompt was sent."""
    meanwhile: tuple[float, ...]
    """And until it was answered."""
    prompt: float
    """From the long prompt to its answer of one token."""


async def disturb(address: str, options: StallOptions, number: int) -> Disturbed:
    """Read one answer and send a prompt amid it."""
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
                    other = asyncio.create_task(_ask(client, options, number))
        if other is None:  # it said less than that
            return Disturbed((), (), 0.0)
        began, ended = await other
    pauses = [(end, end - start) for start, end in itertools.pairwise(arrivals)]
    before = tuple(pause for end, pause in pauses if end <= began)
    meanwhile = tuple(pause for end, pause in pauses if began < end and end - pause < ended)
    return Disturbed(before, meanwhile, ended - began)


async def _ask(client: httpx.AsyncClient, options: StallOptions, number: int) -> tuple[float, float]:
    """When the long prompt was sent and answered."""
    text = "".join(SENTENCE.format(number=number, count=count) for count in range(options.sentences))
    began = time.perf_counter()
    answer = await client.post("chat/completions", json=_body(options, text, 1))
    answer.raise_for_status()
    return began, time.perf_counter()


def _body(options: StallOptions, text: str, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": options.model, "messages": messages, "max_tokens": tokens, "temperature": 0}


def compare(addresses: Sequence[str], options: StallOptions) -> list[list[str]]:
    """Header and a row per endpoint."""
    found: dict[str, list[Disturbed]] = {address: [] for address in addresses}
    with extra("bench"):
        import httpx
    for number in range(options.rounds):
        for address in addresses:
            try:
                found[address].append(asyncio.run(disturb(address, options, number)))
            except httpx.HTTPError as error:
                raise UsageError(f"{address}: {error}") from error
    header = ["endpoint", "answers", "pause before, ms", "meanwhile, ms", "longest, ms", "long prompt, s"]
    return [header, *(_row(address, rounds) for address, rounds in found.items())]


def _row(address: str, rounds: Sequence[Disturbed]) -> list[str]:
    told = [each for each in rounds if each.before and each.meanwhile]
    if not told:
        return [address, "0", "", "", "", ""]
    before = Figure.of([1000 * pause for each in told for pause in each.before])
    meanwhile = Figure.of([1000 * pause for each in told for pause in each.meanwhile])
    longest = Figure.of([1000 * max(each.meanwhile) for each in told])
    prompt = Figure.of([each.prompt for each in told])
    figures = [before.describe(1), meanwhile.describe(1), longest.describe(0), prompt.describe(2)]
    return [address, str(len(told)), *figures]


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


def main() -> None:
    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
