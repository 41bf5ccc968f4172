"""Decide which sequence of an engine serves a prompt, which cache is evicted, and how many tokens a pass evaluates.

`EngineScheduler` carries these decisions out. `Batch` decides before them which answers are computed at all.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from .protocol import Engine, StateKeeper

SEQUENCE_LOST = (
    "another answer started on this model; read one to its end first, load the model twice, or load it with "
    "--parallel for several answers"
)

MIN_REUSED_SHARE = 0.5
"""Least share of a cache that a new prompt must begin with to take the cache over. Below it, the prefix is copied."""

MIN_PARKED_TOKENS = 32
"""Least length of an idle cache that is parked. A shorter one costs the other answers little time."""

PREFILL_BESIDE_DECODES = 128
"""Largest number of prompt tokens in a pass that also decodes. The decodes wait for them."""

MIN_SPEED_SHARE = 0.97
"""Share of the best throughput from which a larger pass is preferred, because fewer answers wait for the next pass."""

MAX_RANGES = 3
"""Largest number of ranges of pass sizes that are printed one by one. More of them are noise."""


@dataclass(eq=False)
class SequenceCache:
    """Tokens in the KV cache of one sequence of the engine."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    holder: object = None
    """The lease that the sequence belongs to. None: the cache is idle."""
    shared: int = 0
    """Tokens at the beginning that are copies of those of `source` and take no slots of their own."""
    source: SequenceCache | None = None
    last_used: int = 0
    """Number of the last use. A smaller one is longer ago."""
    is_pinned: bool = False
    """True if the tokens stay for good. Prompts that begin with them copy them."""

    @property
    def own_tokens(self) -> int:
        """Return the number of tokens that are no copies of another sequence's."""
        return len(self.tokens) - min(self.shared, len(self.tokens))


@dataclass(frozen=True)
class ParkedCache:
    """Tokens of an idle sequence, and its state outside of the engine (`StateKeeper.sequence_state`)."""

    tokens: list[int]
    state: bytes


class CachePool:
    """The caches of all sequences of one engine. The caller must have the engine to itself.

    llama.cpp's attention reads the slots of all sequences, so idle chats slow the others. When a prompt begins, the
    idle caches are therefore parked: their states are copied to ordinary memory, and back when a prompt continues one.
    """

    def __init__(self, engine: Engine, max_parked: int = 0) -> None:
        """Use the sequences of `engine`. At most `max_parked` tokens are parked, none if it has no states."""
        self._engine = engine
        self.max_parked = max_parked if isinstance(engine, StateKeeper) else 0
        self._parked: list[ParkedCache] = []
        """The oldest first."""
        self._cuts = getattr(engine, "cuts_sequences", True)
        self._caches = [SequenceCache(sequence) for sequence in range(engine.num_sequences)]
        self._clock = itertools.count(1)

    def assign(self, holder: object, tokens: Sequence[int]) -> SequenceCache:
        """Return a cache for `holder` with the longest cached prefix of `tokens`.

        A sequence of another holder is taken only if all are held.
        """
        # the last token is always evaluated, because its logits are needed
        limit = len(tokens) - 1
        self._unpark(tokens, limit)
        common = [self._common_length(cache.tokens, tokens, limit) for cache in self._caches]
        # of equal prefixes an idle one, which need not be copied
        best = max(self._caches, key=lambda cache: (common[cache.sequence], cache.holder is None))
        length = common[best.sequence]
        chosen = best
        # Taking over a long cache for a short prefix would evict the rest of it. Then the prefix is copied instead.
        keeps_little = length < MIN_REUSED_SHARE * len(best.tokens)
        if best.holder is not None or best.is_pinned or keeps_little:
            others = (cache for cache in self._caches if not cache.is_pinned)
            chosen = min(others, key=lambda cache: (cache.holder is not None, len(cache.tokens) > 0, cache.last_used))
        if chosen is best:
            self.truncate(chosen, length)
        else:
            self._evict(chosen)
            if length:
                # llama.cpp shares the slots of a copy. Other engines have a cache of fixed size per sequence.
                self._engine.copy(best.sequence, chosen.sequence, length)
                chosen.tokens, chosen.shared, chosen.source = best.tokens[:length], length, best
        chosen.holder = holder
        self.touch(chosen)
        for cache in self._caches:
            if self._can_park(cache):
                self._evict(cache)
        return chosen

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
        idle = [cache for cache in self._caches if cache.holder is None and not cache.is_pinned]
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
            self.touch(target)

    def _can_park(self, cache: SequenceCache) -> bool:
        """Return True if parking an idle cache frees slots worth the copy: those of a shared prefix stay in use."""
        is_idle = cache.holder is None and not cache.is_pinned
        is_long = MIN_PARKED_TOKENS <= len(cache.tokens) <= self.max_parked
        copied = max([cache.shared, *(other.shared for other in self._caches if other.source is cache)])
        return is_idle and is_long and 2 * copied <= len(cache.tokens)

    def _evict(self, cache: SequenceCache) -> None:
        """Empty a cache, and park it if it is idle and worth it."""
        if self._can_park(cache):
            assert isinstance(self._engine, StateKeeper)
            self.park(list(cache.tokens), self._engine.sequence_state(cache.sequence))
        self.truncate(cache, 0)

    def park(self, tokens: list[int], state: bytes) -> None:
        """Keep `state`, of at most `max_parked` tokens, for prompts that begin with `tokens`.

        The oldest others are dropped for it, and those that `tokens` continues.
        """
        self._parked = [each for each in self._parked if each.tokens != tokens[: len(each.tokens)]]
        self._parked.append(ParkedCache(tokens, state))
        while sum(len(each.tokens) for each in self._parked) > self.max_parked:
            del self._parked[0]

    def touch(self, cache: SequenceCache) -> None:
        """Record a use of `cache`."""
        cache.last_used = next(self._clock)

    def has_room(self, num_tokens: int) -> bool:
        """Return True if `num_tokens` more fit."""
        return self.used + num_tokens <= self._engine.cache_slots

    def make_room(self, num_tokens: int) -> None:
        """Evict idle caches until `num_tokens` more fit or no cache is idle."""
        while not self.has_room(num_tokens) and self.evict_idle():
            pass

    def evict_idle(self) -> bool:
        """Evict the least recently used idle cache. Return False if there is none but pinned ones."""
        idle = [cache for cache in self._caches if cache.holder is None and cache.tokens and not cache.is_pinned]
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
        return sum(cache.own_tokens for cache in self._caches if cache.holder is not None)

    def hold_all(self, holder: object, tokens: Sequence[int], limit: int) -> SequenceCache:
        """Give all sequences to `holder`; return sequence 0 with at most `limit` cached tokens of `tokens`.

        The other sequences are emptied, whoever held them.
        """
        for cache in self._caches:
            cache.holder = holder
            self.truncate(cache, 0 if cache.sequence else self._common_length(cache.tokens, tokens, limit))
        return self._caches[0]

    def release_all(self, holder: object) -> None:
        """Make every sequence of `holder` idle."""
        for cache in self._caches:
            if cache.holder is holder:
                cache.holder = None

    def _common_length(self, cached: Sequence[int], tokens: Sequence[int], limit: int) -> int:
        """Return the length of the prefix of `tokens` that a cache of the tokens `cached` can serve."""
        length = common_length(cached, tokens, limit)
        # the state of a recurrent model has all of its tokens in it, so it serves them all or none
        return length if self._cuts or length == len(cached) else 0

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


@runtime_checkable
class PassTimer(Protocol):
    """An engine that measures how the time of a pass grows with its sequences."""

    pass_times: PassTimes | None
    """Measured times of passes, None if there are none."""

    def measure_passes(self, should_stop: Callable[[], bool]) -> None:
        """Set `pass_times`, as measured now or earlier. Leave them as they are if `should_stop` becomes true.

        The call changes no sequence.
        """
        ...


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
