"""How many answers one pass of llama.cpp serves: measured when a model is first loaded for several chats on a machine.

No rule would do. A single token has kernels of its own. Those for several gain nothing on some CPUs below eight rows
(q8_0 on AVX-512 takes four times a single token's time for two of them), on some they want multiples of four (q4_0),
and with AMX every row gains.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..base.progress import PROGRESS_LOGGER
from .llama_context import LlamaContext
from .protocol import Part
from .seen import once

DEPTH = 256
"""Tokens in each chat's cache when its next one is timed; all begin alike and share their room."""
REPEATED = 3
"""Passes of a size, of which the fastest counts: others may be using the machine."""
SECONDS = 4.0
"""Longest that measuring begins another size; what is not measured lies on a line between its neighbours."""
MOST_RANGES = 3
"""Of sizes that are said one by one: more of them are noise."""
AS_GOOD = 0.97
"""Share of the best speed from which more answers in a pass are preferred: each waits less."""


@dataclass(frozen=True)
class PassTimes:
    """Milliseconds of a pass over one more token of 1, 2, ... chats."""

    milliseconds: tuple[float, ...]

    @property
    def largest(self) -> int:
        return len(self.milliseconds)

    def answers(self, waiting: int, beside: int = 0) -> int:
        """How many of `waiting` answers get their next token in one pass beside so many tokens of prompts: as many as
        give the most tokens per second; the others have their turn in the next pass."""
        speeds = {number: (number + beside) / self._of(number + beside) for number in range(1, waiting + 1)}
        least = AS_GOOD * max(speeds.values())
        return max(number for number, speed in speeds.items() if speed >= least)

    def _of(self, tokens: int) -> float:
        """Of as many tokens; beyond what was measured each takes what one of the largest pass does."""
        most = self.largest
        return self.milliseconds[tokens - 1] if tokens <= most else self.milliseconds[-1] * tokens / most

    def __str__(self) -> str:
        """Which sizes passes have, neighbours as a range; of many pieces only the first and the last."""
        sizes = sorted({self.answers(waiting) for waiting in range(1, self.largest + 1)})
        starts = [size for size in sizes if size - 1 not in sizes]
        ends = [size for size in sizes if size + 1 not in sizes]
        if len(starts) > MOST_RANGES:
            starts, ends = starts[:1], ends[-1:]
        ranges = [f"{low}" if low == high else f"{low} to {high}" for low, high in zip(starts, ends, strict=True)]
        found = " or ".join([*filter(None, [", ".join(ranges[:-1])]), ranges[-1]])
        return f"{found} answer{'' if sizes == [1] else 's'} a pass"

    @classmethod
    def parse(cls, text: str, sequences: int) -> PassTimes | None:
        """What `to_text` gave for so many sequences; None for anything else."""
        try:
            values = tuple(map(float, json.loads(text)))
        except (ValueError, TypeError, RecursionError):
            return None
        is_sound = len(values) == sequences and all(math.isfinite(value) and value > 0 for value in values)
        return cls(values) if is_sound else None

    def to_text(self) -> str:
        return json.dumps([max(round(value, 4), 1e-4) for value in self.milliseconds])


def pass_times(path: Path, release: str, context: LlamaContext, sequences: int) -> PassTimes:
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
