"""What passes over the next tokens of several sequences take, and so how many of them a pass should serve."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

AS_GOOD = 0.97
"""Share of the best speed from which more answers in a pass are preferred: each waits less."""
MOST_RANGES = 3
"""Of sizes that are said one by one: more of them are noise."""


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
