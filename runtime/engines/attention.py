"""Which attention kernel and cache type llama.cpp is fastest with: measured when a model is first loaded on a machine.

No rule would do. Its flash attention kernel for CPUs is slow for passes of fewer than 64 tokens over an fp16 cache, on
some CPUs by half and on others hardly; over a Q8_0 cache it is as fast as the plain kernel, which pads the values of an
irregular model to its widest layer.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..base.errors import ArtefactError
from ..base.progress import PROGRESS_LOGGER
from .engine import CacheChoice
from .llama_context import Attention, LlamaContext
from .manifest import once
from .protocol import Part

PLAIN, FLASH, FLASH_Q8_0 = Attention("f16", False), Attention("f16", True), Attention("q8_0", True)

CANDIDATES: dict[CacheChoice, tuple[Attention, ...]] = {
    "auto": (FLASH_Q8_0, PLAIN, FLASH),
    "f16": (PLAIN, FLASH),
    "q8_0": (FLASH_Q8_0,),
    "f32": (Attention("f32", False), Attention("f32", True)),
}
"""Cache type as asked for -> what is tried; plain attention reads no quantized values."""

DEPTH = 512
"""Tokens in the cache when the deep passes are timed."""
FAR = 1536
"""Tokens in the cache that deep decoding, and decoding beside other chats, are continued to, on the line through the
empty one."""
TOGETHER = 8
"""Chats whose next tokens are evaluated in one pass, at most."""
SUFFIX = 24
"""Tokens of a short prompt on a long cache: a chat's next turn."""
BESIDE = 16
"""Tokens in the cache of each other chat."""
REPEATED = 6
"""Decoded tokens per test, of which the fastest counts: others may be using the machine."""
ROUNDS = 2
SECONDS = 4.0
"""Longest a candidate may take to fill the cache; where it would take longer, the cache is filled less."""


def choose_attention(
    path: Path,
    release: str,
    wanted: CacheChoice,
    sequences: int,
    make_context: Callable[[Attention, int, int], LlamaContext],
) -> Attention:
    """The fastest candidate for the model file at `path`, as measured now or earlier on this machine.

    `release`: what else the answer depends on. `sequences`: chats side by side. `make_context` (attention, slots,
    sequences) makes one of the model.
    """
    sequences = min(sequences, TOGETHER)
    candidates = CANDIDATES[wanted]
    if len(candidates) == 1:
        return candidates[0]

    def find_out() -> str:
        logging.getLogger(PROGRESS_LOGGER).info("measuring which attention %s is fastest with", path.name)
        return str(fastest(candidates, sequences, make_context))

    names = {str(candidate): candidate for candidate in candidates}
    beside = f" beside {sequences - 1} others" if sequences > 1 else ""
    question = f"attention of {', '.join(names)}{beside} on {platform.node()} ({release})"
    return names[once(question, [path], find_out, names.__contains__)]


def fastest(
    candidates: Sequence[Attention], sequences: int, make_context: Callable[[Attention, int, int], LlamaContext]
) -> Attention:
    """The candidate with the least mean, over all tests, of its time relative to the best one's."""
    with contextlib.ExitStack() as stack:
        contexts: dict[Attention, LlamaContext] = {}
        slots = DEPTH + SUFFIX + 4 * REPEATED + sequences * (BESIDE + 2 * REPEATED)
        for candidate in candidates:
            with contextlib.suppress(ArtefactError):  # heads of a width that has no whole Q8_0 blocks
                contexts[candidate] = make_context(candidate, slots, sequences)
                stack.callback(contexts[candidate].close)
        if not contexts:
            raise ArtefactError("llama.cpp has no attention for this model")
        # they take turns: whatever else the machine does meanwhile hits all alike
        rounds = [[_tests(context, sequences) for context in contexts.values()] for _ in range(ROUNDS)]
    times = np.min(rounds, axis=0)  # [candidates, tests]
    return list(contexts)[int((times / times.min(axis=0)).mean(axis=1).argmin())]


def _tests(context: LlamaContext, sequences: int) -> list[float]:
    """Seconds of: a token on an empty cache, on a deep one, on one of FAR tokens; a short suffix on a deep cache; where
    there are several sequences, a token of each beside the deep one, and one alone where the others' past takes FAR."""
    for sequence in range(sequences):
        context.truncate(sequence, 0)
    began = time.perf_counter()
    context.extend([Part(0, [0] * 64)])
    depth = min(DEPTH, max(128, int(64 * SECONDS / (time.perf_counter() - began))))
    empty = min(_timed(context, 1) for _ in range(REPEATED))
    if rest := depth - 64 - REPEATED:
        context.extend([Part(0, [0] * rest)])
    deep = min(_timed(context, 1) for _ in range(REPEATED))
    suffix = _timed(context, SUFFIX)

    def far(time: float) -> float:
        return max(time, empty + (time - empty) * FAR / depth)

    times = [empty, deep, far(deep), suffix]
    if sequences > 1:
        context.extend([Part(sequence, [0] * BESIDE) for sequence in range(1, sequences)])
        times.append(min(_timed(context, 1, range(sequences)) for _ in range(REPEATED)))
        # what chats of earlier left in the room of all: the kernel looks at it, too
        times.append(far(min(_timed(context, 1, [1]) for _ in range(REPEATED))))
    return times


def _timed(context: LlamaContext, tokens: int, sequences: Sequence[int] = (0,)) -> float:
    began = time.perf_counter()
    context.extend([Part(sequence, [0] * tokens) for sequence in sequences])
    return time.perf_counter() - began
