"""Speculation: propose the next tokens of an answer, and decide how many of them a pass checks.

The proposal is what followed the last tokens at their latest earlier place in prompt and answer (prompt look-up). A
pass evaluates it together with the last token. Each token of the answer is then chosen from its own logits, so the
proposal only decides how many of them are known after the pass: the text has the distribution of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from .pass_sizes import PassTimes

MIN_MATCH = 3
"""Last tokens that must have occurred before."""

MAX_DRAFT = 24
"""Largest number of proposed tokens of a pass."""

MATCH_LIMITS = (1, 2, 4, 8, 16)
"""Numbers of right proposals in a row at which they are counted apart, because long repetitions go on more often."""

PRIOR_SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Shares of right proposals that are assumed at first, by the same groups."""

PRIOR_COUNT = 10
"""Number of proposals that the assumed shares count as."""

SHARE_RATE, TIME_RATE = 0.02, 0.1
"""Least weight of the last proposal, and weight of the last pass, in the running means."""

MAX_SLOWDOWN = 3.0
"""Multiple of the mean time of a pass above which a time is cut, because other work on the machine disturbed it."""

GUESSED_COST = 0.1
"""Time of a further token in a pass, as a share of the first one's, until it was measured."""

MIN_GAIN = 1.05
"""Least gain of expected tokens per second for which tokens are proposed."""

TRIED_SHARE = 0.02
"""Share of the time of passes with a refused proposal that tries may lose. They measure the times again."""


class PromptLookup:
    """Proposes tokens of one answer and knows how many of its proposals in a row were right."""

    def __init__(self, speculation: Speculation, prompt: Sequence[int]) -> None:
        self._speculation = speculation
        self._tokens = list(prompt)
        ends = range(MIN_MATCH, len(self._tokens))
        self._places = {tuple(self._tokens[end - MIN_MATCH : end]): end for end in ends}
        """{MIN_MATCH tokens: position after their latest place that a token follows}"""
        self._place = self._find()
        """Position of the proposed token, None without a proposal."""
        self.num_right = 0
        """Right proposals since the last wrong one, whether a pass checked them or not."""

    def _find(self) -> int | None:
        return self._places.get(tuple(self._tokens[-MIN_MATCH:]))

    def push(self, token: int) -> None:
        """Append the next token of the answer and count whether it was proposed."""
        is_right = self._place is not None and self._tokens[self._place] == token
        if self._place is not None:
            self._speculation.count(self.num_right, is_right)
        self._places[tuple(self._tokens[-MIN_MATCH:])] = len(self._tokens)
        self._tokens.append(token)
        if is_right:
            assert self._place is not None
            self._place, self.num_right = self._place + 1, self.num_right + 1
        else:
            self._place, self.num_right = self._find(), 0

    def draft(self, longest: int, num_answers: int) -> list[int]:
        """Return the tokens that the next pass of `num_answers` answers checks, [] if that gains nothing."""
        if self._place is None:
            return []
        period = len(self._tokens) - self._place  # a shorter repetition is continued
        count = self._speculation.draft_length(self.num_right, num_answers, min(longest, MAX_DRAFT))
        return [self._tokens[self._place + index % period] for index in range(count)]


class Speculation:
    """Measures on one engine how often proposals are right and how long passes take, while it serves."""

    def __init__(self, times: PassTimes | None = None) -> None:
        """Begin with measured `times` of passes, if there are any."""
        self._shares, self._counts = list(PRIOR_SHARES), [PRIOR_COUNT] * len(PRIOR_SHARES)
        """Share of right proposals by the number of right ones before, and how many were counted."""
        self._ms: dict[int, float] = {}
        """{tokens of a pass: mean milliseconds}"""
        if times is not None:
            self.add_times(times)
        self._credit = 0.0
        """Time that tries may lose, in passes without proposals."""

    def add_times(self, times: PassTimes) -> None:
        """Add measured times of passes that none was recorded for."""
        for number, milliseconds in enumerate(times.milliseconds, start=1):
            self._ms.setdefault(number, milliseconds)

    def count(self, num_right: int, is_right: bool) -> None:
        """Count a proposal after `num_right` right ones."""
        group = sum(num_right >= limit for limit in MATCH_LIMITS)
        self._counts[group] += 1
        self._shares[group] += max(SHARE_RATE, 1 / self._counts[group]) * (is_right - self._shares[group])

    def record_pass(self, num_tokens: int, milliseconds: float) -> None:
        """Record the time of a pass without prompts."""
        # a pass that other work on the machine disturbed must not count in full
        mean = self._ms.get(num_tokens, milliseconds)
        self._ms[num_tokens] = mean + TIME_RATE * (min(milliseconds, MAX_SLOWDOWN * mean) - mean)

    def draft_length(self, num_right: int, num_answers: int, longest: int) -> int:
        """Return how many tokens to propose after `num_right` right ones, beside a token of each answer of a pass.

        That is the number with the most expected tokens per second, 0 if none gains.
        """
        if longest < 1 or num_answers < 1 or min(self._ms, default=num_answers + 1) > num_answers:
            return 0  # a pass without proposals is measured first
        expected = [0.0, *itertools.islice(self._expected_tokens(num_right), longest)]
        times = self._pass_ms(num_answers, longest)
        tokens = num_answers + np.array(expected)
        speeds = tokens / times
        best = int(speeds.argmax())
        if speeds[best] >= MIN_GAIN * speeds[0]:
            return best
        tried = min(longest, max(MIN_MATCH, num_right))
        # in passes without proposals: the time of the try, less the passes that its expected tokens save
        loss = times[tried] / times[0] - tokens[tried] / num_answers
        self._credit += TRIED_SHARE
        # Larger passes may be faster in proportion, which only a try can tell.
        if self._credit < loss and num_answers + tried < 2 * max(self._ms):
            return 0
        self._credit -= loss
        return tried

    def _expected_tokens(self, num_right: int) -> Iterator[float]:
        """Yield the expected number of right tokens among 1, 2, ... proposed ones."""
        total, probability = 0.0, 1.0
        for before in itertools.count(num_right):
            probability *= self._shares[sum(before >= limit for limit in MATCH_LIMITS)]
            total += probability
            yield total

    def _pass_ms(self, num_tokens: int, longest: int) -> np.ndarray:
        """Return the times of passes of `num_tokens` to `num_tokens` + `longest` tokens, [longest + 1].

        Between and beyond measured sizes they lie on lines. A wrong guess is measured when it is used.
        """
        numbers = np.arange(num_tokens, num_tokens + longest + 1)
        sizes = sorted(self._ms)
        times = [self._ms[size] for size in sizes]
        if len(sizes) == 1:
            slope = GUESSED_COST * times[0]
        else:
            slope = max(0.0, times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
        return np.interp(numbers, sizes, times) + slope * np.maximum(numbers - sizes[-1], 0)
