"""Compute several answers together: every pass of the engine decodes a token of each and evaluates parts of prompts.

A `Batch` decides which answers take part. `EngineScheduler` decides which tokens of them a pass evaluates.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .base.errors import ContextOverflowError, UsageError
from .engines.protocol import CacheFullError
from .engines.scheduler import EngineScheduler
from .engines.scheduling_policy import SEQUENCE_LOST, common_length
from .generation import Generation

RESERVED_TOKENS = 64
"""Slots reserved for the text of an answer when it starts. If the slots run out later, the youngest waits again."""

MIN_SHARED_PREFIX = 128
"""Tokens of a prefix that another prompt is evaluating, from which a new prompt waits and then copies them."""

LONG_CHAT = 256
"""Tokens of a chat from which it waits for other long ones where the cache is crowded."""

OTHER_OWNERS_SHARE = 8
"""One of so many sequences stays free for other owners if one owner asks for all of them."""


@dataclass(frozen=True)
class AnswerProgress:
    """Result of one pass for one answer."""

    generation: Generation
    text: str = ""
    is_over: bool = False
    error: BaseException | None = None
    """Reason of a failure, which ends the answer."""


class Batch:
    """Answers that are computed together on one engine, by one thread. Nothing else may use the engine meanwhile."""

    def __init__(self, engine: EngineScheduler) -> None:
        self._engine = engine
        self._waiting: deque[Generation] = deque()
        self._active: list[Generation] = []
        """Answers in progress, oldest first."""
        self._owners: dict[int, Hashable] = {}
        """{id of a generation: its owner}"""
        self._shared: dict[tuple[int, int], int] = {}
        """{ids of two answers: tokens of their shared prefix}, because comparing them takes long"""

    def __len__(self) -> int:
        """Return the number of answers that are not over."""
        return len(self._waiting) + len(self._active)

    def add(self, generation: Generation, owner: Hashable = None) -> None:
        """Queue an answer. Without `owner` it counts as its own owner."""
        self._owners[id(generation)] = id(generation) if owner is None else owner
        self._waiting.append(generation)

    def step(self) -> list[AnswerProgress]:
        """Run one pass and return the progress of every answer that it served."""
        if done := self._remove_ended():
            return done  # reported at once, before the next pass
        self._admit()
        if done := self._remove_ended():
            return done  # a grammar forces all of an answer
        if not self._active:
            return []
        try:
            rows = self._engine.step([generation.lease for generation in self._active])
        except CacheFullError:
            return self._preempt_youngest()
        except Exception as error:  # The engine failed for all answers of the pass. Later ones may succeed.
            return self._fail(self._active, error)
        progress: list[AnswerProgress] = []
        for generation, logits in zip(list(self._active), rows, strict=True):
            if logits is not None:
                progress += self._accept(generation, logits)
        return progress

    def _accept(self, generation: Generation, logits: np.ndarray) -> list[AnswerProgress]:
        """Give an answer the logits of its next token, fp32 [V]."""
        try:
            text = generation.accept(logits)
        except Exception as error:  # for example of its constraint. The other answers go on.
            return self._fail([generation], error)
        if generation.is_over:
            return self._end(generation, text)
        return [AnswerProgress(generation, text)] if text else []

    def abandon(self, error: BaseException) -> list[AnswerProgress]:
        """End every answer that has not started."""
        return self._fail(self._waiting, error)

    def _remove_ended(self) -> list[AnswerProgress]:
        """End cancelled answers, and those that lost their sequence to a caller outside the batch."""
        done: list[AnswerProgress] = []
        for generation in [*self._active, *self._waiting]:
            if generation.is_over:
                done += self._end(generation, "")
            elif generation.lease.is_lost:
                done += self._fail([generation], UsageError(SEQUENCE_LOST))
        return done

    def _admit(self) -> None:
        """Start waiting answers while sequences and slots are free."""
        passed_over: set[int] = set()
        is_crowded = False
        while self._waiting and len(self._active) < self._engine.num_sequences:
            generation = self._next_waiting(passed_over)
            if generation is None:
                return
            # The first answer starts in any case, because it cannot wait for slots that nothing will free.
            if self._active and self._needed_slots([*self._active, generation]) > self._engine.cache_slots:
                return
            # Later long chats wait behind the first one that waits, which they would overtake for ever.
            is_late = self._is_long(generation) and (is_crowded or self._is_crowded_for(generation))
            is_crowded = is_crowded or is_late
            if is_late or self._shares_running_prefill(generation):
                passed_over.add(id(generation))
                continue
            self._waiting.remove(generation)
            self._active.append(generation)
            generation.begin()

    def _next_waiting(self, passed_over: Container[int]) -> Generation | None:
        """Return the waiting answer whose owner has the fewest answers in progress, or None if none may start.

        `passed_over`: ids of those that wait for something else.
        """
        active = Counter(self._owners[id(generation)] for generation in self._active)
        # no owner takes all sequences of a large batch: a new one would wait for the end of somebody's long answers
        limit = self._engine.num_sequences - self._engine.num_sequences // OTHER_OWNERS_SHARE

        def num_active(generation: Generation) -> int:
            return active[self._owners[id(generation)]]

        # owners take turns: fifty answers of one do not delay the only answer of another one
        candidates = [one for one in self._waiting if id(one) not in passed_over]
        chosen = min(candidates, key=num_active, default=None)
        return chosen if chosen is not None and num_active(chosen) < limit else None

    def _needed_slots(self, generations: Sequence[Generation]) -> int:
        """Return the number of cache slots that answers take, as far as it is known. Shared prefixes count once."""
        total = 0
        for index, one in enumerate(generations):
            shared = max((self._shared_tokens(other, one) for other in generations[:index]), default=0)
            total += len(one.tokens) - shared + min(one.max_tokens - len(one.answer), RESERVED_TOKENS)
        return total

    def _shared_tokens(self, earlier: Generation, later: Generation) -> int:
        """Return the length of the prefix that `later` takes from `earlier`, 0 if each evaluates it."""
        pair = id(earlier), id(later)
        if pair not in self._shared:
            limit = len(later.tokens) - 1
            length = common_length(earlier.tokens, later.tokens, limit) if self._engine.cuts_sequences else 0
            self._shared[pair] = length if length >= MIN_SHARED_PREFIX else 0
        return self._shared[pair]

    def _shares_running_prefill(self, generation: Generation) -> bool:
        """Return True if a prompt in progress has a long common prefix, which is cheaper to copy afterwards."""
        if not self._engine.cuts_sequences:  # a state of the whole prompt cannot be cut to its prefix
            return False
        limit = len(generation.tokens) - 1
        return any(
            # a shorter prompt counts if all of it but the last token is shared
            common_length(other.tokens, generation.tokens, limit) >= min(MIN_SHARED_PREFIX, limit)
            for other in self._active
            if other.lease.num_pending > 1
        )

    def _is_long(self, generation: Generation) -> bool:
        """Return True if a chat takes the slots of a long one, beside a prefix that it shares."""
        shared = max((self._shared_tokens(other, generation) for other in self._active), default=0)
        return len(generation.tokens) - shared >= LONG_CHAT

    def _is_crowded_for(self, generation: Generation) -> bool:
        """Return True if a long chat is answered sooner after others, because each slows all of them.

        Two long chats are answered at once in any case, and short ones wait for none.
        """
        long = [one for one in self._active if len(one.tokens) >= LONG_CHAT]
        return len(long) >= 2 and self._needed_slots([*long, generation]) > self._engine.crowded_slots

    def _preempt_youngest(self) -> list[AnswerProgress]:
        """Put the youngest answer back into the queue. Its tokens are evaluated again later."""
        if len(self._active) == 1:
            error = ContextOverflowError("the caches of this model are full; load it with a larger --cache-memory")
            return self._fail(self._active, error)
        # always the youngest, so that the oldest gets to its end
        youngest = self._active.pop()
        youngest.lease.release()
        self._waiting.appendleft(youngest)
        return []

    def _end(self, generation: Generation, text: str) -> list[AnswerProgress]:
        self._remove(generation)
        return [AnswerProgress(generation, text + generation.finish(), is_over=True)]

    def _fail(self, generations: Iterable[Generation], error: BaseException) -> list[AnswerProgress]:
        failed = list(generations)
        for generation in failed:
            self._remove(generation)
        return [AnswerProgress(generation, is_over=True, error=error) for generation in failed]

    def _remove(self, generation: Generation) -> None:
        for answers in (self._active, self._waiting):
            if generation in answers:
                answers.remove(generation)
        # Python may give the id of a freed answer to a new one, so nothing may stay under it.
        self._owners.pop(id(generation), None)
        self._shared = {pair: length for pair, length in self._shared.items() if id(generation) not in pair}
        generation.lease.release()
