"""Decide which sequence of an engine serves an answer and which cache is evicted.

The sequence of an answer is in one of these states:

    waiting  --pass-->  leased  <--pass-->  in a pass
                         |  ^
                 release |  | reacquire, or a prompt with the same prefix
                         v  |
                    idle (cached)  -->  parked or evicted

- waiting: the lease has tokens, but no sequence of the engine yet.
- leased: the lease holds a sequence, whose cache is kept until the release.
- in a pass: the engine evaluates tokens of the sequence at this moment.
- idle: no lease holds the sequence, but its tokens stay cached for later prompts.
- parked: the cache was copied to ordinary memory, and comes back for a prompt with the same prefix.
- evicted: the cache was emptied for other tokens. A lease whose sequence was taken is lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..base.errors import UsageError
from .protocol import Chunk, Engine, StateKeeper

SEQUENCE_LOST = (
    "another answer started on this model; read one to its end first, load the model twice, or load it with "
    "--parallel for several answers"
)

MIN_REUSED_SHARE = 0.5
"""Least share of a cache that a new prompt must begin with to take the cache over. Below it, the prefix is copied."""

MIN_PARKED_TOKENS = 32
"""Least length of an idle cache that is parked. A shorter one costs the other answers little time."""

MAX_PARKED_CHATS = 16
"""Largest number of parked caches. Many short prompts that nothing continues would only take memory."""


@dataclass(eq=False)
class Lease:
    """The right of one answer to a sequence of the engine, until the release or until other answers need the sequence.

    Only `CachePool` writes the sequence and what follows from it.
    """

    tokens: list[int] = field(default_factory=list)
    """All tokens of the answer's sequence, evaluated or not."""
    sequence: int | None = None
    """Number of the sequence, None before the first pass."""
    cached_tokens: int = 0
    """Number of tokens that were cached already when the sequence was assigned."""
    is_interrupted: bool = False
    """True if no more tokens are evaluated."""
    is_idle: bool = False
    """True if any answer may take the sequence at any time, because no use of it is known to be the last."""
    draft: list[int] = field(default_factory=list)
    """Proposed tokens after `tokens`. The next pass evaluates those that fit and removes the others from here."""
    draft_start: int = 0
    """Number of tokens before a proposal that was evaluated, 0 if the cache has none but `tokens`."""


@dataclass(eq=False)
class SequenceCache:
    """Tokens in the KV cache of one sequence of the engine."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    holder: Lease | None = None
    """The lease that the sequence belongs to."""
    shared: int = 0
    """Tokens at the beginning that are copies of those of `source` and take no slots of their own."""
    source: SequenceCache | None = None
    last_used: int = 0
    """Number of the last use. A smaller one is longer ago."""
    is_pinned: bool = False
    """True if the tokens stay for good. Prompts that begin with them copy them."""

    @property
    def is_idle(self) -> bool:
        """Return True if the tokens only serve as prefixes of later prompts."""
        return self.holder is None or self.holder.is_idle

    @property
    def own_tokens(self) -> int:
        """Return the number of tokens that are no copies of another sequence's."""
        return len(self.tokens) - min(self.shared, len(self.tokens))


@dataclass(frozen=True)
class ParkedCache:
    """Tokens of an idle sequence, and its state outside of the engine (`StateKeeper.sequence_state`)."""

    tokens: list[int]
    state: memoryview


class CachePool:
    """The caches of all sequences of one engine, which nothing else writes. The caller must have the engine to itself.

    llama.cpp's attention reads the slots of all sequences, so idle chats slow the others. When a prompt begins, the
    idle caches are therefore parked: their states are copied to ordinary memory, and back when a prompt continues one.
    """

    def __init__(self, engine: Engine, max_parked: int = 0) -> None:
        """Use the sequences of `engine`. At most `max_parked` tokens are parked, none if it has no states."""
        self._engine = engine
        self.max_parked = max_parked if isinstance(engine, StateKeeper) else 0
        self._parked: list[ParkedCache] = []
        """The oldest first."""
        self._caches = [SequenceCache(sequence) for sequence in range(engine.num_sequences)]
        self._clock = itertools.count(1)

    @property
    def num_sequences(self) -> int:
        """Return the number of sequences for answers: all but the pinned ones."""
        return sum(not cache.is_pinned for cache in self._caches)

    @property
    def slots(self) -> int:
        """Return the number of tokens of answers that the caches hold together, beside the pinned ones."""
        return self._engine.cache_slots - sum(len(cache.tokens) for cache in self._caches if cache.is_pinned)

    def is_held(self, lease: Lease) -> bool:
        """Return True if the lease holds a sequence."""
        return lease.sequence is not None and self._caches[lease.sequence].holder is lease

    def is_lost(self, lease: Lease) -> bool:
        """Return True if another answer took the sequence."""
        return lease.sequence is not None and not self.is_held(lease)

    def num_pending(self, lease: Lease) -> int:
        """Return the number of tokens that are not evaluated yet, without proposed ones."""
        return len(lease.tokens) - (0 if lease.sequence is None else len(self._caches[lease.sequence].tokens))

    def cache_of(self, lease: Lease) -> SequenceCache:
        """Return the cache of a lease, assigned now if it has none. Raise UsageError if the sequence is lost."""
        if lease.sequence is None:
            self._assign(lease)
        assert lease.sequence is not None
        cache = self._caches[lease.sequence]
        if cache.holder is not lease:
            raise UsageError(SEQUENCE_LOST)
        if lease.draft_start:  # proposed tokens of the last pass that the answer does not have are removed
            begin, lease.draft_start = lease.draft_start, 0
            answer = lease.tokens[begin:]
            self.truncate(cache, begin + common_length(cache.tokens[begin:], answer, len(answer)))
        return cache

    def take_chunk(self, lease: Lease, count: int) -> Chunk:
        """Return the first `count` pending and proposed tokens as part of a pass. Remove the others from the draft."""
        cache = self.cache_of(lease)
        begin = len(cache.tokens)
        lease.draft = lease.draft[: max(0, count - self.num_pending(lease))]
        lease.draft_start = len(lease.tokens) if lease.draft else 0
        tokens = lease.tokens[begin : begin + count] + lease.draft
        return Chunk(cache.sequence, tokens, begin + count >= len(lease.tokens), len(lease.draft))

    def append(self, sequence: int, tokens: Sequence[int]) -> None:
        """Record that tokens were evaluated."""
        cache = self._caches[sequence]
        cache.tokens += tokens
        self._touch(cache)

    def release(self, lease: Lease) -> None:
        """Make the sequence of a lease idle. Its tokens stay cached."""
        if lease.sequence is not None and self.is_held(lease):  # another answer may hold the sequence by now
            self._caches[lease.sequence].holder = None
        lease.sequence = None

    def pin(self, lease: Lease) -> None:
        """Release the sequence of a lease and never evict it."""
        self.cache_of(lease).is_pinned = True
        self.release(lease)

    def _assign(self, lease: Lease) -> None:
        """Give a lease the cache with the longest cached prefix of its tokens.

        A sequence of another lease is taken only if all are held.
        """
        tokens = lease.tokens
        # the last token is always evaluated, because its logits are needed
        limit = len(tokens) - 1
        self._unpark(tokens, limit)
        common = [self._common_length(cache.tokens, tokens, limit) for cache in self._caches]
        # of equal prefixes an idle one, which need not be copied
        best = max(self._caches, key=lambda cache: (common[cache.sequence], cache.is_idle))
        length = common[best.sequence]
        chosen = best
        # Taking over a long cache for a short prefix would evict the rest of it. Then the prefix is copied instead.
        keeps_little = length < MIN_REUSED_SHARE * len(best.tokens)
        if not best.is_idle or best.is_pinned or keeps_little:
            others = (cache for cache in self._caches if not cache.is_pinned)
            chosen = min(others, key=lambda cache: (not cache.is_idle, len(cache.tokens) > 0, cache.last_used))
        if chosen is best:
            self.truncate(chosen, length)
        else:
            self._evict(chosen)
            if length:
                # llama.cpp shares the slots of a copy. Other engines have a cache of fixed size per sequence.
                self._engine.copy(best.sequence, chosen.sequence, length)
                chosen.tokens, chosen.shared, chosen.source = best.tokens[:length], length, best
        chosen.holder, lease.sequence, lease.cached_tokens = lease, chosen.sequence, len(chosen.tokens)
        self._touch(chosen)
        for cache in self._caches:
            if self._can_park(cache):
                self._evict(cache)

    def park_in_advance(self) -> None:
        """Park the idle caches that fit beside the parked ones, but the last used one, whose chat may go on."""
        for cache in sorted(self._caches, key=lambda cache: cache.last_used)[:-1]:
            room = self.max_parked - sum(len(each.tokens) for each in self._parked)
            if self._can_park(cache) and len(cache.tokens) <= room:
                self._evict(cache)

    def _unpark(self, tokens: Sequence[int], limit: int) -> None:
        """Bring a parked cache back if it has a longer prefix of `tokens` than the sequences have."""
        held = max(self._common_length(cache.tokens, tokens, limit) for cache in self._caches)
        lengths = [self._common_length(parked.tokens, tokens, limit) for parked in self._parked]
        idle = [cache for cache in self._caches if cache.is_idle and not cache.is_pinned]
        if not idle or max(lengths, default=0) <= held:
            return
        # of equal prefixes the one that is copied soonest
        index = min(range(len(lengths)), key=lambda each: (-lengths[each], len(self._parked[each].tokens)))
        parked = self._parked.pop(index)
        target = min(idle, key=lambda cache: (len(cache.tokens) > 0, cache.last_used))
        self._evict(target)
        self.make_room(len(parked.tokens))
        assert isinstance(self._engine, StateKeeper)
        if self._engine.restore_sequence(target.sequence, parked.state, len(parked.tokens)):
            target.tokens = parked.tokens
            self._touch(target)

    def _can_park(self, cache: SequenceCache) -> bool:
        """Return True if parking an idle cache frees slots worth the copy: those of a shared prefix stay in use."""
        is_idle = cache.is_idle and not cache.is_pinned
        is_long = MIN_PARKED_TOKENS <= len(cache.tokens) <= self.max_parked
        copied = max([cache.shared, *(other.shared for other in self._caches if other.source is cache)])
        return is_idle and is_long and 2 * copied <= len(cache.tokens)

    def _evict(self, cache: SequenceCache) -> None:
        """Empty a cache, and park it if it is idle and worth it."""
        if self._can_park(cache):
            assert isinstance(self._engine, StateKeeper)
            self.park(list(cache.tokens), self._engine.sequence_state(cache.sequence))
        self.truncate(cache, 0)

    def park(self, tokens: list[int], state: memoryview) -> None:
        """Keep `state`, of at most `max_parked` tokens, for prompts that begin with `tokens`.

        The oldest others are dropped for it, and those that `tokens` continues.
        """
        self._parked = [each for each in self._parked if each.tokens != tokens[: len(each.tokens)]]
        self._parked.append(ParkedCache(tokens, state))
        while len(self._parked) > MAX_PARKED_CHATS or sum(len(each.tokens) for each in self._parked) > self.max_parked:
            del self._parked[0]

    def _touch(self, cache: SequenceCache) -> None:
        cache.last_used = next(self._clock)

    def make_room(self, num_tokens: int) -> None:
        """Evict idle caches until `num_tokens` more fit or no cache is idle."""
        while self.used + num_tokens > self._engine.cache_slots and self.evict_idle():
            pass

    def evict_idle(self) -> bool:
        """Evict the least recently used idle cache. Return False if there is none but pinned ones."""
        idle = [cache for cache in self._caches if cache.is_idle and cache.tokens and not cache.is_pinned]
        if idle:
            self._evict(min(idle, key=lambda cache: cache.last_used))
        return bool(idle)

    def states(self, min_tokens: int) -> list[ParkedCache]:
        """Return copies of all caches of at least `min_tokens` tokens, the last used first.

        Those much like one before are left out.
        """
        assert isinstance(self._engine, StateKeeper)
        found: list[ParkedCache] = []
        for cache in sorted(self._caches, key=lambda cache: cache.last_used, reverse=True):
            if len(cache.tokens) >= min_tokens and not is_much_like(cache.tokens, found):
                found.append(ParkedCache(list(cache.tokens), self._engine.sequence_state(cache.sequence)))
        for parked in reversed(self._parked):
            if len(parked.tokens) >= min_tokens and not is_much_like(parked.tokens, found):
                found.append(parked)
        return found

    @property
    def used(self) -> int:
        """Return the number of cached tokens, with shared ones counted once."""
        return sum(cache.own_tokens for cache in self._caches)

    @property
    def held(self) -> int:
        """Return the number of cached tokens under a lease, with shared ones counted once."""
        return sum(cache.own_tokens for cache in self._caches if not cache.is_idle)

    def _common_length(self, cached: Sequence[int], tokens: Sequence[int], limit: int) -> int:
        """Return the length of the prefix of `tokens` that a cache of the tokens `cached` can serve."""
        length = common_length(cached, tokens, limit)
        # the state of a recurrent model has all of its tokens in it, so it serves them all or none
        return length if self._engine.traits.cuts_sequences or length == len(cached) else 0

    def truncate(self, cache: SequenceCache, length: int) -> None:
        """Remove all but the first `length` tokens of `cache`."""
        if length < len(cache.tokens):
            self._engine.truncate(cache.sequence, length)
            cache.tokens = cache.tokens[:length]
            for other in self._caches:  # whose copies have these slots to themselves now
                if other.source is cache:
                    other.shared = min(other.shared, length)
        cache.shared = min(cache.shared, length)


def is_much_like(tokens: Sequence[int], others: Sequence[ParkedCache]) -> bool:
    """Return True if more than half of `tokens` are a prefix of one of `others`."""
    length = len(tokens)
    return any(common_length(other.tokens, tokens, length) > MIN_REUSED_SHARE * length for other in others)


def common_length(cached: Sequence[int], tokens: Sequence[int], limit: int) -> int:
    """Return the length of the common prefix, at most `limit`."""
    limit = min(limit, len(cached))
    if list(cached[:limit]) == list(tokens[:limit]):  # the next turn of a chat: one fast comparison
        return limit
    common = 0
    while cached[common] == tokens[common]:
        common += 1
    return common
