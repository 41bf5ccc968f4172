"""Decide which answers a pass computes: each pass decodes a token of each and evaluates parts of prompts."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..base.errors import UsageError
from .cache_pool import SEQUENCE_LOST, Lease, common_length
from .protocol import CacheFullError
from .shared_engine import SharedEngine

RESERVED_TOKENS = 64
"""Slots reserved for the text of an answer when it starts. If the slots run out later, the youngest waits again."""

MIN_SHARED_PREFIX = 128
"""Tokens of a prefix that another prompt is evaluating, from which a new prompt waits and then copies them."""

LONG_CHAT = 256
"""Tokens of a chat from which it waits for other long ones where the cache is crowded."""

OTHER_OWNERS_SHARE = 8
"""One of so many sequences stays free for other owners if one owner asks for all of them."""


class TokenSource(Protocol):
    """Chooses the tokens of one answer. `Generation` does, and describes the members."""

    lease: Lease
    tokens: list[int]
    answer: list[int]
    max_tokens: int
    is_over: bool

    def begin(self) -> None: ...
    def restart_clock(self) -> None: ...
    def accept(self, logits: np.ndarray) -> str: ...
    def finish(self) -> str: ...
    def cancel(self) -> bool: ...


@dataclass(frozen=True)
class AnswerProgress:
    """Result of one pass for one answer."""

    answer: Answer
    text: str = ""
    is_over: bool = False
    error: BaseException | None = None
    """Reason of a failure, which ends the answer."""


@dataclass(eq=False)
class Answer:
    """One answer that is computed, and the caller that reads it."""

    generation: TokenSource
    receive: Callable[[AnswerProgress], object]
    """Called with each progress. It must not wait."""
    owner: Hashable
    """Owners take turns, however many answers they ask for."""
    is_pulled: bool = False
    """True if the answer waits after each text until it is added again. It keeps its sequence if nobody needs it."""
    shared: dict[Answer, int] = field(default_factory=dict)
    """{earlier answer: tokens of the prefix that this one takes from it}, because comparing them takes long"""

    @property
    def lease(self) -> Lease:
        """Return the lease of the tokens to evaluate."""
        return self.generation.lease


class Batch:
    """Answers that are computed together on one engine, by one thread."""

    def __init__(self, engine: SharedEngine) -> None:
        self._engine = engine
        self._waiting: deque[Answer] = deque()
        self._active: list[Answer] = []
        """Answers in progress, oldest first."""

    def __len__(self) -> int:
        """Return the number of answers that are not over."""
        return len(self._waiting) + len(self._active)

    def add(self, answer: Answer) -> None:
        """Queue an answer. One that is queued already stays where it is."""
        if answer not in self._active and answer not in self._waiting:
            self._waiting.append(answer)

    def step(self) -> list[AnswerProgress]:
        """Run one pass and return the progress of every answer that it served."""
        if done := self._remove_ended():
            return done  # reported at once, before the next pass
        if done := self._admit():
            return done
        if not self._active:
            return []
        try:
            rows = self._engine.step([answer.lease for answer in self._active])
        except CacheFullError as error:
            return self._preempt_youngest(error)
        except Exception as error:  # The engine failed for all answers of the pass. Later ones may succeed.
            return self._fail(self._active, error)
        progress: list[AnswerProgress] = []
        for answer, logits in zip(list(self._active), rows, strict=True):
            if logits is not None:
                progress += self._accept(answer, logits)
        return progress

    def _accept(self, answer: Answer, logits: np.ndarray) -> list[AnswerProgress]:
        """Give an answer the logits of its next token, fp32 [V]."""
        try:
            text = answer.generation.accept(logits)
        except Exception as error:  # for example of its constraint. The other answers go on.
            return self._fail([answer], error)
        if answer.generation.is_over:
            return self._end(answer, text)
        if text and answer.is_pulled:
            self._active.remove(answer)
        return [AnswerProgress(answer, text)] if text else []

    def abandon(self, error: BaseException) -> list[AnswerProgress]:
        """End every answer that has not started."""
        return self._fail(self._waiting, error)

    def _remove_ended(self) -> list[AnswerProgress]:
        """End cancelled answers, and those that lost their sequence to a caller outside the batch."""
        done: list[AnswerProgress] = []
        for answer in [*self._active, *self._waiting]:
            if answer.generation.is_over:
                done += self._end(answer, "")
            elif self._engine.pool.is_lost(answer.lease):
                done += self._fail([answer], UsageError(SEQUENCE_LOST))
        return done

    def _admit(self) -> list[AnswerProgress]:
        """Start waiting answers while sequences and slots are free, and return those that ended at once."""
        passed_over: set[Answer] = set()
        is_crowded, failed = False, list[AnswerProgress]()
        while self._waiting and len(self._active) < self._engine.num_sequences:
            answer = self._next_waiting(passed_over)
            if answer is None:
                break
            if not self._engine.pool.is_held(answer.lease):  # a pulled answer may hold its sequence and goes on
                # The first answer starts in any case, because it cannot wait for slots that nothing will free.
                if self._active and self._needed_slots([*self._active, answer]) > self._engine.cache_slots:
                    break
                # Later long chats wait behind the first one that waits, which they would overtake for ever.
                is_late = self._is_long(answer) and (is_crowded or self._is_crowded_for(answer))
                is_crowded = is_crowded or is_late
                if is_late or self._shares_running_prefill(answer):
                    passed_over.add(answer)
                    continue
            self._waiting.remove(answer)
            self._active.append(answer)
            try:
                if self._engine.pool.is_held(answer.lease):
                    answer.generation.restart_clock()
                else:
                    answer.generation.begin()
            except Exception as error:  # for example because the model was closed
                failed += self._fail([answer], error)
        return failed + self._remove_ended()  # a grammar may force all of an answer

    def _next_waiting(self, passed_over: Container[Answer]) -> Answer | None:
        """Return the waiting answer whose owner has the fewest answers in progress, or None if none may start.

        `passed_over`: those that wait for something else.
        """
        active = Counter(answer.owner for answer in self._active)
        # no owner takes all sequences of a large batch: a new one would wait for the end of somebody's long answers
        limit = self._engine.num_sequences - self._engine.num_sequences // OTHER_OWNERS_SHARE
        # owners take turns: fifty answers of one do not delay the only answer of another one
        candidates = [answer for answer in self._waiting if answer not in passed_over]
        chosen = min(candidates, key=lambda answer: active[answer.owner], default=None)
        return chosen if chosen is not None and active[chosen.owner] < limit else None

    def _needed_slots(self, answers: Sequence[Answer]) -> int:
        """Return the number of cache slots that answers take, as far as it is known. Shared prefixes count once."""
        total = 0
        for index, one in enumerate(answers):
            shared = max((self._shared_tokens(other, one) for other in answers[:index]), default=0)
            generation = one.generation
            total += len(generation.tokens) - shared
            total += min(generation.max_tokens - len(generation.answer), RESERVED_TOKENS)
        return total

    def _shared_tokens(self, earlier: Answer, later: Answer) -> int:
        """Return the length of the prefix that `later` takes from `earlier`, 0 if each evaluates it."""
        if earlier not in later.shared:
            length = self._common_length(earlier, later)
            later.shared[earlier] = length if length >= MIN_SHARED_PREFIX else 0
        return later.shared[earlier]

    def _common_length(self, earlier: Answer, later: Answer) -> int:
        """Return the length of the common prefix, but for the last token. 0 if a sequence cannot be cut to it."""
        tokens = later.generation.tokens
        if not self._engine.traits.cuts_sequences:
            return 0
        return common_length(earlier.generation.tokens, tokens, len(tokens) - 1)

    def _shares_running_prefill(self, answer: Answer) -> bool:
        """Return True if a prompt in progress has a long common prefix, which is cheaper to copy afterwards."""
        # a shorter prompt counts if all of it but the last token is shared
        least = max(1, min(MIN_SHARED_PREFIX, len(answer.generation.tokens) - 1))
        running = (other for other in self._active if self._engine.pool.num_pending(other.lease) > 1)
        return any(self._common_length(other, answer) >= least for other in running)

    def _is_long(self, answer: Answer) -> bool:
        """Return True if a chat takes the slots of a long one, beside a prefix that it shares."""
        shared = max((self._shared_tokens(other, answer) for other in self._active), default=0)
        return len(answer.generation.tokens) - shared >= LONG_CHAT

    def _is_crowded_for(self, answer: Answer) -> bool:
        """Return True if a long chat is answered sooner after another, because each slows the others.

        Two long chats without a third are answered at once in any case, and short ones wait for none.
        """
        groups = (self._active, self._waiting)
        active, waiting = ([one for one in group if len(one.generation.tokens) >= LONG_CHAT] for group in groups)
        if not active or len(active) + len(waiting) < 3:
            return False
        return self._needed_slots([*active, answer]) > self._engine.traits.crowded_slots

    def _preempt_youngest(self, error: CacheFullError) -> list[AnswerProgress]:
        """Put the youngest answer back into the queue. Its tokens are evaluated again later. The only one fails."""
        if len(self._active) == 1:
            return self._fail(self._active, error)
        # always the youngest, so that the oldest gets to its end
        youngest = self._active.pop()
        self._engine.release(youngest.lease)
        self._waiting.appendleft(youngest)
        return []

    def _end(self, answer: Answer, text: str) -> list[AnswerProgress]:
        self._remove(answer)
        return [AnswerProgress(answer, text + answer.generation.finish(), is_over=True)]

    def _fail(self, answers: Iterable[Answer], error: BaseException) -> list[AnswerProgress]:
        failed = list(answers)
        for answer in failed:
            self._remove(answer)
        return [AnswerProgress(answer, is_over=True, error=error) for answer in failed]

    def _remove(self, answer: Answer) -> None:
        for answers in (self._active, self._waiting):
            if answer in answers:
                answers.remove(answer)
        answer.shared.clear()  # else each answer would keep all earlier ones alive
        self._engine.release(answer.lease)
