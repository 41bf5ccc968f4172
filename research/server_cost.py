"""Measure the cost of the server: `python -m research.server_cost ARTEFACT`.

The engine in this process and a server in a child process answer the same prompts in turn. The second turn of a chat is
timed with and without its cached beginning. Sampled answers and JSON are compared with greedy answers. At last the
server's memory is measured over many short requests.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import ArtefactError
from efficientllm.runtime.base.quantities import Figure
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.grammar import Grammar, GrammarConstraint
from efficientllm.runtime.prompt import chat_prompt
from efficientllm.runtime.sampling import SamplingOptions

CONTEXT = 1024
START_SECONDS = 120
TEXT = "Tell a story about a lighthouse keeper, number {number}."


@dataclass(frozen=True)
class ServerCostOptions:
    """Measurement."""

    threads: int = 1
    """CPU threads; 0: all cores."""
    rounds: int = flags.number(20, at_least=1)
    """Pairs of answers, after one warm-up pair."""
    tokens: int = flags.number(128, at_least=2)
    """Tokens per answer."""
    requests: int = 0
    """Short requests of the memory measurement; 0: none."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


@dataclass(frozen=True)
class Timing:
    """Times of one answer."""

    first_token_ms: float
    decode_tokens_per_second: float


@contextmanager
def serve_in_child(artefact: str, threads: int) -> Iterator[httpx.Client]:
    """Yield a client of a server of `artefact` in a child process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "efficientllm.runtime.start", "serve", "--model", f"model={artefact}"),
        *("--port", str(port), "--threads", str(threads), "--context", str(CONTEXT), "--parallel", "1"),
    ]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + START_SECONDS
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            while True:
                if child.poll() is not None or time.monotonic() > deadline:
                    lines = child.stderr.read().splitlines() if child.stderr and child.poll() is not None else []
                    raise ArtefactError(lines[-1].removeprefix("error: ") if lines else "the server did not start")
                try:
                    client.get("/health").raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield client
    finally:
        child.terminate()
        child.wait()


def timing(began: float, arrivals: list[float]) -> Timing:
    """Return the times of an answer whose tokens arrived at `arrivals`, in seconds of the clock of `began`."""
    return Timing(1000 * (arrivals[0] - began), (len(arrivals) - 1) / (arrivals[-1] - arrivals[0]))


def ask_engine(engine: EngineScheduler, text: str, tokens: int) -> Timing:
    began, arrivals = time.perf_counter(), []
    prompt = chat_prompt(engine, [{"role": "user", "content": text}])
    for _ in Generation(engine, prompt, AnswerOptions(tokens)):
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
    """Print the medians of engine and server, and the median difference of the pairs."""
    pairs = []
    with serve_in_child(artefact, threads) as client:
        engine = load_engine(artefact, EngineOptions(threads=threads, context=CONTEXT))
        for number in range(rounds + 1):
            text = TEXT.format(number=number)
            sides = [lambda: ask_engine(engine, text, tokens), lambda: ask_server(client, text, tokens)]  # noqa: B023
            timings = [side() for side in (sides if number % 2 else sides[::-1])]
            if number:  # the first pair is the warm-up
                pairs.append(timings if number % 2 else timings[::-1])
        engine.close()
    for index, name in enumerate(("engine", "server")):
        print(
            f"{name}: time to first token {spread([pair[index].first_token_ms for pair in pairs], 'ms')}, "
            f"decode {spread([pair[index].decode_tokens_per_second for pair in pairs], 'tokens/s')}"
        )
    added_ms = [through.first_token_ms - direct.first_token_ms for direct, through in pairs]
    lost = [100 * (1 - through.decode_tokens_per_second / direct.decode_tokens_per_second) for direct, through in pairs]
    print(f"added to the first token: {spread(added_ms, 'ms')}")
    print(f"lost of decode speed: {spread(lost, '%')}")


def prefix_reuse(artefact: str, threads: int, rounds: int) -> None:
    """Print the time to the first token of the second turn of a chat.

    It is measured with the first turn cached, after a turn of another chat, and without a cache.
    """
    engine = load_engine(artefact, EngineOptions(threads=threads, context=CONTEXT, parallel=2, warm_up=True))
    print(engine.settings)
    times: tuple[list[float], ...] = ([], [], [])
    long: list[int] = []
    for number in range(rounds):
        first = [{"role": "user", "content": f"{number}. " + "The lighthouse stands on a rock in the sea. " * 30}]
        turns = [*first, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Who keeps it?"}]
        short, long = chat_prompt(engine, first), chat_prompt(engine, turns)
        other = chat_prompt(engine, [{"role": "user", "content": f"{number}? " + "Ships pass it at night. " * 40}])
        for index, befores in enumerate(((short,), (short, other), ([number], [number + 1]))):
            for before in befores:
                engine.prefill(before)
            began = time.perf_counter()
            engine.prefill(long)
            times[index].append(1000 * (time.perf_counter() - began))
    engine.close()
    names = ("cached", "after another chat's turn", "from scratch")
    shown = ", ".join(f"{name} {spread(values, 'ms')}" for name, values in zip(names, times, strict=True))
    print(f"second turn of {len(long)} tokens: {shown}")


def answer_cost(artefact: str, threads: int, rounds: int, tokens: int) -> None:
    """Print how much slower sampled answers and JSON of a schema are than greedy answers of the same length."""
    engine = load_engine(artefact, EngineOptions(threads=threads, context=CONTEXT, warm_up=True))
    prompt = chat_prompt(engine, [{"role": "user", "content": TEXT.format(number=0)}])
    text = {"type": "string", "minLength": 100 * tokens}  # longer than any answer
    schema = Grammar.json_schema({"type": "object", "properties": {"text": text}, "required": ["text"]})
    sides: dict[str, tuple[SamplingOptions, Grammar | None]] = {
        "greedy": (SamplingOptions(), None),
        "sampled": (SamplingOptions(temperature=0.8), None),
        "sampled with penalties": (
            SamplingOptions(1.0, repetition_penalty=1.1, frequency_penalty=0.1, presence_penalty=0.1),
            None,
        ),
        "JSON of a schema": (SamplingOptions(), schema),
    }
    endless = dict.fromkeys(engine.end_ids, float("-inf"))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, (sampling, grammar) in sides.items():
            options = AnswerOptions(tokens, sampling, logit_bias=endless)
            constraint = GrammarConstraint(engine, grammar) if grammar is not None else None
            generation = Generation(engine, prompt, options, constraint)
            for _ in generation:
                pass
            seconds[name].append(generation.stats.decode_seconds)
    engine.close()
    greedy, *others = (values[1:] for values in seconds.values())  # the first round is the warm-up
    for name, values in zip(list(sides)[1:], others, strict=True):
        slower = [100 * (one / other - 1) for one, other in zip(values, greedy, strict=True)]
        print(f"{name}, {engine.vocab_size:,} tokens of vocabulary: slower than greedy by {spread(slower, '%')}")


def spread(values: list[float], unit: str) -> str:
    """Return the text "median unit (first to third quartile, n)"."""
    figure = Figure.of(values)
    return f"{figure.median:.1f} {unit} ({figure.low:.1f} to {figure.high:.1f}, n = {figure.n})"


def memory(artefact: str, threads: int, requests: int) -> None:
    """Print the allocated memory of a server at intervals over `requests` short requests."""
    with serve_in_child(artefact, threads) as client:
        for number in range(requests + 1):
            if number in (0, requests // 10) or (number and number % (requests // 5) == 0):
                anonymous = client.get("/health").json()["rss_anon_bytes"]
                print(f"after {number:>6} requests: {anonymous / 1e6:.1f} MB allocated", flush=True)
            if number < requests:
                body = {"model": "model", "messages": [{"role": "user", "content": f"Hi {number}"}], "max_tokens": 4}
                client.post("/v1/chat/completions", json=body).raise_for_status()


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(ServerCostOptions, prog="python -m research.server_cost", description=__doc__)
    parser.add_argument("artefact", help="folder written by efficientllm-export, or a .gguf or .pte file")
    arguments = parser.parse(argv)
    artefact, options = arguments.pop("artefact"), flags.take(arguments, ServerCostOptions)
    overhead(artefact, options.threads, options.rounds, options.tokens)
    prefix_reuse(artefact, options.threads, options.rounds)
    answer_cost(artefact, options.threads, options.rounds, options.tokens)
    if options.requests:
        memory(artefact, options.threads, options.requests)
    return 0


def main() -> None:
    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
