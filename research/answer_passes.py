"""Measure the passes and the time of answers: `python -m research.answer_passes ARTEFACT test.jsonl`.

Every setting has an engine of its own and answers the same requests in turn: a token for every pass, then with the
tokens that a grammar forces and with prompt look-up. A request begins with a cold cache except for
what it shares with earlier ones. The times of all settings are compared with those of the first one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.base.quantities import Figure, markdown_table
from efficientllm.runtime.chat_template import Message
from efficientllm.runtime.copied_arguments import ToolArguments
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.prompt import ToolUse, tool_prompt
from efficientllm.runtime.sampling import SamplingOptions


@dataclass(frozen=True)
class PassOptions:
    """Measurement."""

    instruction: str = "Write this text again:"
    """Instruction in front of a `text`."""
    words: int = flags.number(80, at_least=1)
    """Words of a `text`."""
    limit: int = flags.number(100, at_least=1)
    """Number of requests."""
    tokens: int = flags.number(128, at_least=2)
    """Most tokens of an answer."""
    temperature: float = flags.number(0.0, at_least=0)
    """Temperature."""
    arguments: ToolArguments = "any"
    """Texts in arguments of calls, as the server's --tool-arguments."""
    free: bool = False
    """Answer without a grammar."""
    threads: int = 1
    """CPU threads; 0: all cores."""
    context: int = flags.number(2048, at_least=1)
    """Context window of every engine."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


@dataclass(frozen=True)
class Request:
    """A conversation that ends before the answer, and its functions."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]]


@dataclass
class Setting:
    """An engine and the answers that it gave."""

    name: str
    engine: EngineScheduler
    forces: bool
    """Tokens that a grammar forces take no pass of their own."""
    texts: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Whole time of every answer: rendering, grammar, prompt and tokens."""
    decode_seconds: list[float] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    drafted = accepted = 0


def read_requests(task: str, options: PassOptions) -> list[Request]:
    """Return the first `limit` requests of a file. Raise UsageError if it cannot be read.

    A record has `messages`, whose last answer is left out, and perhaps `tools`; or a `question`; or a `text`.
    """
    found = []
    try:
        with Path(task).open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                messages = record.get("messages")
                if messages is None:
                    text = " ".join(record.get("text", "").split()[: options.words])
                    content = f"{options.instruction}\n\n{text}" if text else record["question"]
                    messages = [{"role": "user", "content": content}]
                elif messages[-1]["role"] == "assistant":
                    messages = messages[:-1]
                found.append(Request(messages, record.get("tools", [])))
                if len(found) == options.limit:
                    break
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{task}: {error}") from error
    return found


def load_settings(artefact: str, options: PassOptions) -> list[Setting]:
    """Load an engine for every setting, with as many sequences as the server's."""

    def engine(lookup: bool) -> EngineScheduler:
        chosen = EngineOptions(options.threads, options.context, parallel=16, lookup=lookup)
        return load_engine(artefact, chosen)

    settings = [Setting("one token a pass", engine(False), False)]
    if not options.free:
        settings.append(Setting("forced tokens", engine(False), True))
    settings.append(Setting("look-up", engine(True), True))
    return settings


def answer(setting: Setting, request: Request, options: PassOptions, seed: int) -> None:
    """Answer a request and record it."""
    began = time.perf_counter()
    use = ToolUse(request.tools, arguments=options.arguments) if request.tools else None
    prompt = tool_prompt(setting.engine, request.messages, use)
    constraint = None if options.free else prompt.constraint(setting.engine)
    sampling = SamplingOptions(temperature=options.temperature, seed=seed)
    bias = {} if setting.forces else {0: 0.0}  # a bias turns forced tokens off, and 0 changes no answer
    limits = AnswerOptions(options.tokens, sampling, logit_bias=bias)
    generation = Generation(setting.engine, prompt.tokens, limits, constraint)
    setting.texts.append("".join(generation))
    stats = generation.stats
    setting.seconds.append(time.perf_counter() - began)
    setting.decode_seconds.append(stats.decode_seconds)
    setting.passes.append(stats.passes)
    setting.tokens.append(stats.completion_tokens)
    setting.drafted += stats.drafted_tokens
    setting.accepted += stats.accepted_tokens


def table(settings: Sequence[Setting]) -> list[list[str]]:
    """Return a header and a row for each setting."""
    first = settings[0]
    header = ["", "passes", "of the first", "ms an answer", "of the first", "tokens", "tokens/s, of the first"]
    rows = [[*header, "proposed", "accepted", "same answers"]]
    for setting in settings:
        number = len(setting.texts)
        passes, ms = sum(setting.passes) / number, 1e3 * sum(setting.seconds) / number
        times = [one / other for one, other in zip(setting.seconds, first.seconds, strict=True)]
        speed = _decode_speed(setting) / _decode_speed(first)
        same = sum(one == other for one, other in zip(setting.texts, first.texts, strict=True))
        rows.append(
            [
                setting.name,
                f"{passes:.1f}",
                f"{sum(setting.passes) / sum(first.passes):.2f}",
                f"{ms:.0f}",
                f"{sum(setting.seconds) / sum(first.seconds):.2f}; of an answer {Figure.of(times).describe(2)}",
                f"{sum(setting.tokens) / number:.1f}",
                f"{speed:.2f}",
                f"{setting.drafted / number:.1f}",
                f"{setting.accepted / number:.1f}",
                f"{same} of {number}",
            ]
        )
    return rows


def _decode_speed(setting: Setting) -> float:
    """Return the tokens per second of decoding."""
    return sum(setting.tokens) / max(1e-9, sum(setting.decode_seconds))


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(PassOptions, prog="python -m research.answer_passes", description=__doc__)
    parser.add_argument("artefact", help="folder written by efficientllm-export, or a .gguf file")
    parser.add_argument("task", help=".jsonl with messages and tools, questions, or texts for --instruction")
    arguments = parser.parse(argv)
    artefact, task, options = arguments.pop("artefact"), arguments.pop("task"), flags.take(arguments, PassOptions)
    requests = read_requests(task, options)
    settings = load_settings(artefact, options)
    for number, request in enumerate(requests):
        turn = number % len(settings)
        for setting in settings[turn:] + settings[:turn]:
            answer(setting, request, options, number)
    print(markdown_table(table(settings)))
    for setting in settings:
        setting.engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
