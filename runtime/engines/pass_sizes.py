"""How many answers one pass of llama.cpp serves: measured when a model is first loaded for several chats on a machine.

No rule would do. A single token has kernels of its own. Those for several gain nothing on some CPUs below eight rows
(q8_0 on AVX-512 takes four times a single token's time for two of them), on some they want multiples of four (q4_0),
and with AMX every row gains.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..base.progress import PROGRESS_LOGGER
from .llama_context import LlamaContext
from .manifest import once
from .protocol import Part, PassTimes

DEPTH = 256
"""Tokens in each chat's cache when its next one is timed; all begin alike and share their room."""
REPEATED = 3
"""Passes of a size, of which the fastest counts: others may be using the machine."""
SECONDS = 4.0
"""Longest that measuring begins another size; what is not measured lies on a line between its neighbours."""


def measured_pass_times(path: Path, release: str, context: LlamaContext, sequences: int) -> PassTimes:
    """Of the model file at `path` in `context`, as measured now or earlier on this machine; the context ends up empty.

    `release`: what else they depend on.
    """

    def find_out() -> str:
        logging.getLogger(PROGRESS_LOGGER).info("measuring how many answers a pass of %s should serve", path.name)
        return PassTimes(tuple(_measure(context, sequences))).to_text()

    def is_answer(text: str) -> bool:
        return PassTimes.parse(text, sequences) is not None

    question = f"milliseconds of passes for {sequences} on {platform.node()} ({release})"
    found = PassTimes.parse(once(question, [path], find_out, is_answer), sequences)
    assert found is not None
    return found


def _measure(context: LlamaContext, sequences: int) -> list[float]:
    """Milliseconds of a pass over one token of 1, 2, ... sequences each."""
    depth = min(DEPTH, context.slots // 2)
    context.extend([Part(0, [0] * depth, wants_logits=False)])
    for sequence in range(1, sequences):
        context.copy(0, sequence, depth)
    began, found = time.perf_counter(), {}
    for size in _most_telling_first(sequences):
        if found and time.perf_counter() - began > SECONDS:
            break
        found[size] = min(_timed(context, size, depth) for _ in range(REPEATED))
    for sequence in range(sequences):
        context.truncate(sequence, 0)
    measured = sorted(found)
    return list(np.interp(range(1, sequences + 1), measured, [found[size] for size in measured]))


def _most_telling_first(sequences: int) -> Sequence[int]:
    """1 to `sequences`: the ends, then what has the highest power of two."""
    return sorted(range(1, sequences + 1), key=lambda size: (size not in (1, sequences), -(size & -size), size))


def _timed(context: LlamaContext, size: int, depth: int) -> float:
    began = time.perf_counter()
    context.extend([Part(sequence, [0]) for sequence in range(size)])
    milliseconds = 1e3 * (time.perf_counter() - began)
    for sequence in range(size):
        context.truncate(sequence, depth)
    return milliseconds
