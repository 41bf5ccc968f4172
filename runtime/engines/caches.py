"""Which sequence of an engine holds what: a new prompt goes where most of it is, the longest unused one gives way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from .protocol import Engine

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
