"""Child process that measures one artefact in its engine: `python -m efficientllm.devices.measure REQUEST`.

REQUEST is JSON (see `Request`); the result, JSON too, is the last line of standard output. A fresh process per artefact
keeps peak memory and caches apart.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np

from ..runtime.engine import Engine, EngineOptions, load
from ..runtime.memory import memory_bytes


@dataclass(frozen=True)
class Request:
    """What to measure."""

    artefact: str
    prompt_tokens: int
    decode_tokens: int
    repetitions: int
    threads: int


@dataclass(frozen=True)
class Measurement:
    """Raw figures of one process; one list entry per repetition."""

    load_ms: float
    prefill_tokens_per_second: list[float]
    decode_tokens_per_second: list[float]
    peak_rss_bytes: int
    rss_anon_bytes: int
    rss_file_bytes: int
    baseline_rss_bytes: int
    """Resident memory of Python and its libraries before the model was loaded."""


def measure(request: Request) -> Measurement:
    """Load, warm up, and time prefill and decode; weights are read, not mapped, so that RSS counts them once."""
    baseline = memory_bytes().get("rss_bytes", 0)
    context = request.prompt_tokens + request.decode_tokens + 1
    engine = load(request.artefact, EngineOptions(threads=request.threads, context=context, memory_map=False))
    random = np.random.default_rng(0)
    prefill, decode = [], []
    for repetition in range(request.repetitions + 1):
        speeds = _run_once(engine, request, random)
        if repetition:  # the first one warms up
            prefill.append(speeds[0])
            decode.append(speeds[1])
    memory = memory_bytes()
    engine.close()
    return Measurement(
        load_ms=engine.load_ms,
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=decode,
        peak_rss_bytes=memory["peak_rss_bytes"],
        rss_anon_bytes=memory.get("rss_anon_bytes", 0),
        rss_file_bytes=memory.get("rss_file_bytes", 0),
        baseline_rss_bytes=baseline,
    )


def _run_once(engine: Engine, request: Request, random: np.random.Generator) -> tuple[float, float]:
    """(prefill, decode) tokens per second on random tokens; a new first token makes every prefill a full one."""
    prompt = random.choice(engine.vocab_size, request.prompt_tokens, replace=False).tolist()
    following = random.integers(engine.vocab_size, size=request.decode_tokens).tolist()
    began = time.perf_counter()
    engine.prefill(prompt)
    middle = time.perf_counter()
    for token in following:
        engine.decode(token)
    ended = time.perf_counter()
    return request.prompt_tokens / (middle - began), request.decode_tokens / (ended - middle)


def main(argument: str) -> None:
    print(json.dumps(asdict(measure(Request(**json.loads(argument))))))


if __name__ == "__main__":
    main(sys.argv[1])
