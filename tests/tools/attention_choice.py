"""What `--kv-cache auto` chose beside all it could have: `python tests/tools/attention_choice.py ARTEFACT...`.

Timed in turn are llama.cpp with each attention and the engine as it is loaded, Python included: a token after 1,536
others, and the first token of a chat's second turn, 24 new tokens on 350 cached ones.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.quantities import Figure, markdown_table
from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.llama_context import AttentionSettings, LlamaContext
from efficientllm.runtime.engines.llama_cpp import LlamaCppEngine
from efficientllm.runtime.engines.protocol import Chunk
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.engines.tuning import CANDIDATES

CONTEXT, DEPTH, CHAT, SUFFIX = 2048, 1536, 350, 24
TOKENS = 8
"""Decoded tokens per round."""

ATTENTIONS = [*CANDIDATES["auto"], *CANDIDATES["f32"]]


@dataclass(frozen=True)
class ChoiceOptions:
    """measurement"""

    threads: int = 1
    """CPU threads."""
    rounds: int = 10
    """Rounds, in which the settings take turns."""


@dataclass(frozen=True)
class Side:
    """One way to run the model, its cache filled to DEPTH."""

    name: str
    decode: Callable[[], object]
    second_turn: Callable[[], object]
    close: Callable[[], object]


def bare(engine: LlamaCppEngine, attention: AttentionSettings, threads: int) -> Side:
    """llama.cpp alone: sequence 0 is deep, sequence 1 a chat."""
    context = LlamaContext(engine._model, threads, attention, CONTEXT + CHAT + SUFFIX, 2)
    for sequence, length in ((0, DEPTH), (1, CHAT)):
        for begin in range(0, length, context.max_batch):
            context.extend([Chunk(sequence, range(begin, min(begin + context.max_batch, length)))])

    def second_turn() -> None:
        context.truncate(1, CHAT)
        context.extend([Chunk(1, range(CHAT, CHAT + SUFFIX))])

    return Side(str(attention), lambda: context.extend([Chunk(0, [5])]), second_turn, context.close)


def ours(engine: EngineScheduler) -> Side:
    """The engine as everybody gets it."""
    deep, chat = engine.lease(), engine.lease()
    deep.begin(range(DEPTH))
    deep.evaluate()
    chat.begin(range(CHAT))
    chat.evaluate()
    questions = itertools.count(CHAT)

    def decode() -> None:
        deep.append(5)
        deep.evaluate()

    def second_turn() -> None:
        chat.begin([*range(CHAT), *[next(questions)] * SUFFIX])  # another one each time: the last one's is cached
        chat.evaluate()

    return Side(f"auto: {engine.settings}", decode, second_turn, engine.close)


def measure(path: str, options: ChoiceOptions) -> list[list[str]]:
    """A row per setting."""
    artefact = Artefact.open(path)
    loaded = LlamaCppEngine(artefact.model_file, EngineOptions(options.threads, context=256, kv_cache="q8_0"))
    chosen = load_engine(artefact, EngineOptions(options.threads, CONTEXT, parallel=2))
    sides = [ours(chosen), *(bare(loaded, attention, options.threads) for attention in ATTENTIONS)]
    times: dict[str, tuple[list[float], list[float]]] = {side.name: ([], []) for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            times[side.name][0].extend(_milliseconds(side.decode) for _ in range(TOKENS))
            times[side.name][1].append(_milliseconds(side.second_turn))
    for side in sides:
        side.close()
    loaded.close()
    figures = {name: [Figure.of(values) for values in both] for name, both in times.items()}
    best = [min(figures[side.name][index].median for side in sides[1:]) for index in range(2)]
    return [[artefact.path.name, name, *map(_shown, both, best)] for name, both in figures.items()]


def _milliseconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - began)


def _shown(figure: Figure, best: float) -> str:
    return f"{figure.median:.2f} ({figure.low:.2f}-{figure.high:.2f}), {figure.median / best:.2f}"


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(ChoiceOptions, prog="python tests/tools/attention_choice.py", description=__doc__)
    parser.add_argument("artefact", nargs="+", help=".gguf file or folder")
    arguments = parser.parse(argv)
    paths, options = arguments.pop("artefact"), flags.take(arguments, ChoiceOptions)
    header = ["artefact", "attention", f"token at {DEPTH:,}, ms, of the best", "second turn, ms, of the best"]
    print(markdown_table([header, *(row for path in paths for row in measure(path, options))]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
