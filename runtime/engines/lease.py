"""Sequences that answers hold on an engine, and how many of their tokens one pass evaluates.

Which sequence of an engine holds what: a new prompt goes where most of it is, the longest unused one gives way.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .protocol import Engine, Part

KEPT_SHARE = 0.5
"""Least share of what a cache holds that a new prompt must begin with to go on in it; else it only copies that."""


@dataclass(eq=False)
class Cache:
    """What one sequence of the engine holds."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    holder: object = None
    """Whose answer is being computed in it; None: nobody's."""
    shared: int = 0
    """Tokens at its beginning that take no room of their own, being copies of another sequence's."""
    last_used: int = 0


class Caches:
    """The caches of one engine; whoever calls has the engine to itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._caches = [Cache(sequence) for sequence in range(engine.num_sequences)]
        self._clock = itertools.count(1)

    def assign(self, holder: object, tokens: Sequence[int]) -> Cache:
        """A cache for `holder` that holds all it can of `tokens`, but for the last one: its logits are asked for.

        Taken from another holder only where all are held.
        """
        limit = len(tokens) - 1
        common = {cache.sequence: common_length(cache.tokens, tokens, limit) for cache in self._caches}
        best = max(self._caches, key=lambda cache: (common[cache.sequence], cache.holder is None))
        length = common[best.sequence]
        chosen = self._free_one() if best.holder is not None or length < KEPT_SHARE * len(best.tokens) else best
        if chosen is best:
            self._truncate(chosen, length)
        else:
            self._truncate(chosen, 0)
            if length:
                self._engine.copy(best.sequence, chosen.sequence, length)
                chosen.tokens, chosen.shared = best.tokens[:length], length
        chosen.holder = holder
        self.touch(chosen)
        return chosen

    def _free_one(self) -> Cache:
        """The cache that was not used for longest, one that nobody holds if there is one."""
        return min(self._caches, key=lambda cache: (cache.holder is not None, cache.last_used))

    def touch(self, cache: Cache) -> None:
        """It is in use."""
        cache.last_used = next(self._clock)

    def make_room(self, tokens: int) -> None:
        """Empty caches that nobody holds, the longest unused first, until `tokens` more fit; as far as it goes."""
        idle = [cache for cache in self._caches if cache.holder is None and cache.tokens]
        for cache in sorted(idle, key=lambda cache: cache.last_used):
            if self.used + tokens <= self._engine.cache_slots:
                return
            self._truncate(cache, 0)

    def empty_idle(self) -> bool:
        """Empty the longest unused cache that nobody holds; False where there is none."""
        idle = [cache for cache in self._caches if cache.holder is None and cache.tokens]
        if idle:
            self._truncate(min(idle, key=lambda cache: cache.last_used), 0)
        return bool(idle)

    @property
    def used(self) -> int:
        """Tokens that the caches hold, those that share their room counted once."""
        return sum(len(cache.tokens) - min(cache.shared, len(cache.tokens)) for cache in self._caches)

    @property
    def held(self) -> int:
        """Of `used`, what belongs to answers that are being computed."""
        return sum(len(cache.tokens) for cache in self._caches if cache.holder is not None)

    def take_all(self, holder: object, tokens: Sequence[int], limit: int) -> Cache:
        """Sequence 0 with what it has of `tokens`, `limit` at most; every other one is empty, whoever held it."""
        for cache in self._caches:
            cache.holder = holder
            self._truncate(cache, 0 if cache.sequence else common_length(cache.tokens, tokens, limit))
        return self._caches[0]

    def give_back(self, holder: object) -> None:
        """Nobody holds what `holder` did."""
        for cache in self._caches:
            if cache.holder is holder:
                cache.holder = None

    def _truncate(self, cache: Cache, length: int) -> None:
        if length < len(cache.tokens):
            self._engine.truncate(cache.sequence, length)
            del cache.tokens[length:]
        cache.shared = min(cache.shared, length)


def common_length(held: Sequence[int], tokens: Sequence[int], limit: int) -> int:
    """How many tokens both begin with, `limit` at most."""
    limit = min(limit, len(held))
    if list(held[:limit]) == list(tokens[:limit]):  # a chat that goes on: compared in one go
        return limit
    common = 0
    while held[common] == tokens[common]:
        common += 1
    return common


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
