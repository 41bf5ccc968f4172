"""Decide how many tokens of each sequence a pass evaluates, from measured times of passes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

PREFILL_BESIDE_DECODES = 128
"""Largest number of prompt tokens in a pass that also decodes. The decodes wait for them."""

MIN_SPEED_SHARE = 0.97
"""Share of the best throughput from which a larger pass is preferred, because fewer answers wait for the next pass."""

MAX_RANGES = 3
"""Largest number of ranges of pass sizes that are printed one by one. More of them are noise."""


@dataclass(frozen=True)
class PassTimes:
    """Measured times of passes that decode one token for each of 1, 2, ... sequences."""

    milliseconds: tuple[float, ...]

    @property
    def largest(self) -> int:
        """Return the largest number of sequences that was measured."""
        return len(self.milliseconds)

    def num_decodes(self, waiting: int, prompt_tokens: int = 0) -> int:
        """Return how many of `waiting` decodes one pass serves beside `prompt_tokens` tokens of prompts.

        That is the number with the most tokens per second. The other answers are served by the next pass.
        """
        speeds = []
        for number in range(1, waiting + 1):
            num_tokens = number + prompt_tokens
            speeds.append(num_tokens / self._ms(num_tokens))
        # Noise of 3 % decides nothing: among equally fast passes the largest lets the fewest answers wait.
        least = MIN_SPEED_SHARE * max(speeds)
        return max(number for number, speed in enumerate(speeds, start=1) if speed >= least)

    def _ms(self, num_tokens: int) -> float:
        """Return the time of a pass. Beyond the measured sizes it grows in proportion to the tokens."""
        if num_tokens <= self.largest:
            return self.milliseconds[num_tokens - 1]
        return self.milliseconds[-1] * num_tokens / self.largest

    def __str__(self) -> str:
        """Return the pass sizes in use, such as "1 or 8 to 10 answers a pass"."""
        sizes = sorted({self.num_decodes(waiting) for waiting in range(1, self.largest + 1)})
        starts = [size for size in sizes if size - 1 not in sizes]
        ends = [size for size in sizes if size + 1 not in sizes]
        if len(starts) > MAX_RANGES:
            starts, ends = starts[:1], ends[-1:]
        ranges = [f"{low}" if low == high else f"{low} to {high}" for low, high in zip(starts, ends, strict=True)]
        listed = f"{', '.join(ranges[:-1])} or {ranges[-1]}" if len(ranges) > 1 else ranges[0]
        return f"{listed} answer{'' if sizes == [1] else 's'} a pass"

    @classmethod
    def parse(cls, text: str, num_sequences: int) -> PassTimes | None:
        """Return the times that `to_text` wrote for `num_sequences`, or None if `text` is anything else."""
        try:
            values = tuple(map(float, json.loads(text)))
        except (ValueError, TypeError, RecursionError):
            return None
        is_valid = len(values) == num_sequences and all(math.isfinite(value) and value > 0 for value in values)
        return cls(values) if is_valid else None

    def to_text(self) -> str:
        """Return the times as JSON, rounded to 0.1 microseconds."""
        # `parse` refuses 0, to which a fast pass could be rounded
        return json.dumps([max(round(value, 4), 1e-4) for value in self.milliseconds])


def plan_pass(pending: Sequence[int], last_used: Sequence[int], max_tokens: int, times: PassTimes | None) -> list[int]:
    """Return how many tokens of each sequence the next pass evaluates, `max_tokens` together.

    `pending`: tokens of each sequence that are not evaluated yet. One is a decode, more are a prompt.
    `last_used`: number of each sequence's last pass. `times`: measured times of passes, if the engine has them.

    Without `times` every decode is in every pass. With them, a pass takes the number of decodes with the best measured
    throughput. A larger pass is not always faster: on AVX-512, q8_0 takes four times as long for two tokens as for
    one.
    """
    counts = split_pass(pending, max_tokens)
    if times is None:
        return counts
    decodes = [index for index, number in enumerate(pending) if number == 1]
    prompts = [index for index, count in enumerate(counts) if count]
    if decodes:
        num_prompt_tokens = sum(counts) - len(decodes)
        served = times.num_decodes(len(decodes), num_prompt_tokens)
        # so that all answers take turns
        longest_waiting_first = sorted(decodes, key=last_used.__getitem__)
        for index in longest_waiting_first[served:]:
            counts[index] = 0
    elif len(prompts) == 1 and counts[prompts[0]] <= times.largest:
        # A short question on a long chat is faster in passes of a good size as well.
        counts[prompts[0]] = times.num_decodes(counts[prompts[0]])
    return counts


def split_pass(pending: Sequence[int], max_tokens: int) -> list[int]:
    """Return how many pending tokens of each sequence fit into a pass of `max_tokens`.

    All decodes come first. Beside them, prompts share at most PREFILL_BESIDE_DECODES tokens: a quarter of the room is
    for the prompt that came first, the rest for the shortest ones.
    """
    counts = [int(number == 1) for number in pending]
    room = max_tokens - sum(counts)
    if any(counts):  # answers in progress must not wait for a long prefill
        room = min(room, PREFILL_BESIDE_DECODES)
    prompts = [index for index, number in enumerate(pending) if number > 1]
    if prompts:  # any number of short prompts would otherwise starve a long one
        counts[prompts[0]] = min(pending[prompts[0]], room // 4)
        room -= counts[prompts[0]]
    # the shortest first, which have the first tokens of their answers soonest
    for index in sorted(prompts, key=pending.__getitem__):
        more = min(pending[index] - counts[index], room)
        counts[index] += more
        room -= more
    return counts
