"""Sequences that answers hold on an engine, and how many of their tokens one pass evaluates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .caches import Cache
from .protocol import Part

SHARED_PREFILL = 128
"""Prompt tokens evaluated beside other answers' next tokens: what those wait for."""


class Evaluator(Protocol):
    """Who evaluates leases: an `OwnedEngine`, where the methods are explained."""

    def step(self, leases: Sequence[Lease]) -> list[np.ndarray | None]: ...
    def release(self, lease: Lease, keep: bool) -> None: ...
    def take_again(self, lease: Lease) -> None: ...
    def interrupt(self, lease: Lease) -> bool: ...


class Lease:
    """One sequence on an engine, whose cache is kept until `release`, or until others need it."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self.tokens: list[int] = []
        """The sequence, evaluated or not."""
        self.cache: Cache | None = None
        """What is evaluated of it; None before the first pass. The evaluator's."""
        self.cached_tokens = 0
        """Of the tokens that it began with, what a cache held already."""
        self.is_interrupted = False

    def begin(self, tokens: Sequence[int]) -> None:
        """Make `tokens` the sequence; nothing is evaluated yet."""
        self._evaluator.release(self, keep=False)
        self.tokens = list(tokens)

    def append(self, token: int) -> None:
        """Append one token, to be evaluated."""
        self.tokens.append(token)

    @property
    def num_pending(self) -> int:
        """Tokens that are not evaluated yet."""
        return len(self.tokens) - (0 if self.cache is None else len(self.cache.tokens))

    @property
    def is_lost(self) -> bool:
        """Whether another sequence was begun in its cache."""
        return self.cache is not None and self.cache.holder is not self

    def next_part(self, share: int) -> Part:
        """The first `share` tokens that are not evaluated yet, to be appended to the cache."""
        assert self.cache is not None
        begin = len(self.cache.tokens)
        tokens = self.tokens[begin : begin + share]
        return Part(self.cache.sequence, tokens, begin + share == len(self.tokens))

    def evaluate(self) -> np.ndarray:
        """Logits after the last token, fp32 [V]; see OwnedEngine.step for the errors."""
        while (logits := self._evaluator.step([self])[0]) is None:
            pass
        return logits

    def interrupt(self) -> bool:
        """Evaluate no more of it, and leave the pass in progress if it takes part; whether it does. From any thread."""
        self.is_interrupted = True
        return self._evaluator.interrupt(self)

    def release(self, keep: bool = False) -> None:
        """Nobody goes on with it; what the cache holds stays, for prompts that begin like it.

        With `keep`, `take_again` may find it as it was left.
        """
        self._evaluator.release(self, keep)

    def take_again(self) -> None:
        """Undo `release(keep=True)`; UsageError where the cache was used meanwhile."""
        self._evaluator.take_again(self)


def shares(pending: Sequence[int], most: int) -> list[int]:
    """How many of each lease's pending tokens one pass of `most` evaluates: all next tokens, then the shortest prompts.

    A quarter of what is left goes to the prompt that came first, so that no number of short ones keeps a long one out.
    """
    found = [int(number == 1) for number in pending]
    room = most - sum(found)
    if any(found):
        room = min(room, SHARED_PREFILL)
    prompts = [index for index, number in enumerate(pending) if number > 1]
    for index in prompts[:1]:
        found[index] = min(pending[index], room // 4)
        room -= found[index]
    for index in sorted(prompts, key=pending.__getitem__):
        more = min(pending[index] - found[index], room)
        found[index] += more
        room -= more
    return found
