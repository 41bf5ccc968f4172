"""Several answers computed together: one pass of the engine evaluates the next token of each, and parts of prompts."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass

from .base.errors import ContextOverflowError, UsageError
from .engines.lease import common_length
from .engines.owned import TAKEN, OwnedEngine
from .engines.protocol import CacheFullError
from .generation import Generation

HEADROOM = 64
"""Tokens of an answer for which room is kept when it begins; where more run out of room, the youngest waits again."""

WORTH_WAITING = 128
"""Tokens of a prompt that another one is just evaluating: waiting for them costs less than evaluating them twice."""


OTHERS_SHARE = 8
"""One of so many sequences is left to others by an owner who asks for all of them."""


@dataclass(frozen=True)
class Progress:
    """What one pass made of one answer."""

    generation: Generation
    text: str = ""
    is_over: bool = False
    error: BaseException | None = None
    """Why the answer ends, where it fails."""


class Batch:
    """Answers on one engine, which nobody else evaluates with meanwhile; used by one thread."""

    def __init__(self, engine: OwnedEngine) -> None:
        self._engine = engine
        self._waiting: deque[Generation] = deque()
        self._active: list[Generation] = []
        """In the order they began."""
        self._owners: dict[int, Hashable] = {}
        """{id of a generation: who asked for it}"""

    def __len__(self) -> int:
        """Answers that are not over."""
        return len(self._waiting) + len(self._active)

    def add(self, generation: Generation, owner: Hashable = None) -> None:
        """Compute this one, too, when there is room for it; by default nobody else's is its owner's.

        Owners take turns: who asked for fifty answers does not keep who asks for one out until they are all there.
        """
        self._owners[id(generation)] = id(generation) if owner is None else owner
        self._waiting.append(generation)

    def step(self) -> list[Progress]:
        """One pass of the engine, and what it made of every answer that it served; the caller repeats it."""
        if done := self._leave():
            return done  # without the wait for a pass
        self._admit()
        if not self._active:
            return []
        try:
            rows = self._engine.step([generation.lease for generation in self._active])
        except CacheFullError:
            return self._make_room()
        except Exception as error:  # of the engine, which serves them all: each is told, the next ones may do better
            return self._fail(self._active, error)
        done = []
        for generation, logits in zip(list(self._active), rows, strict=True):
            if logits is not None:
                try:
                    text = generation.accept(logits)
                except Exception as error:  # of its constraint, say: nobody else's
                    done += self._fail([generation], error)
                    continue
                if text and not generation.is_over:
                    done.append(Progress(generation, text))
                elif generation.is_over:
                    done += self._end(generation, text)
        return done

    def abandon(self, error: BaseException) -> list[Progress]:
        """End every answer that has not begun."""
        return self._fail(list(self._waiting), error)

    def _leave(self) -> list[Progress]:
        """End what was cancelled, and what lost its cache to somebody outside."""
        done: list[Progress] = []
        for generation in [*self._active, *self._waiting]:
            if generation.is_over:
                done += self._end(generation, "")
            elif generation.lease.is_lost:
                done += self._fail([generation], UsageError(TAKEN))
        return done

    def _admit(self) -> None:
        """Begin what waits, as long as there are sequences and room for it; who has fewest answers in progress first,
        of those the one that came first."""
        passed_over: list[Generation] = []
        while self._waiting and len(self._active) < self._engine.num_sequences:
            generation = self._next(passed_over)
            if generation is None:
                return
            if self._active and self._needed([*self._active, generation]) > self._engine.cache_slots:
                return
            if self._awaits_another(generation):
                passed_over.append(generation)
                continue
            self._waiting.remove(generation)
            self._active.append(generation)
            generation.begin()

    def _next(self, passed_over: list[Generation]) -> Generation | None:
        """Whose turn it is of those that wait; None where nobody's."""
        active = Counter(self._owners[id(generation)] for generation in self._active)
        most = self._engine.num_sequences - self._engine.num_sequences // OTHERS_SHARE

        def has(generation: Generation) -> int:
            return active[self._owners[id(generation)]]

        able = [one for one in self._waiting if has(one) < most and not any(one is other for other in passed_over)]
        return min(able, key=has, default=None)

    def _needed(self, generations: list[Generation]) -> int:
        """Room in the caches that answers take, as far as it can be told."""
        return sum(len(one.tokens) + min(one.max_tokens - len(one.answer), HEADROOM) for one in generations)

    def _awaits_another(self, generation: Generation) -> bool:
        """Whether a prompt that is being evaluated has so much of this one's that it is better copied from there."""
        tokens = generation.tokens
        for other in self._active:
            if other.lease.num_pending > 1:
                common = common_length(other.tokens, tokens, len(tokens) - 1)
                if common >= min(WORTH_WAITING, len(tokens) - 1):
                    return True
        return False

    def _make_room(self) -> list[Progress]:
        """Let the youngest answer wait again; its tokens are evaluated anew then."""
        if len(self._active) == 1:
            error = ContextOverflowError("the caches of this model are full; load it with a larger --cache-memory")
            return self._fail(self._active, error)
        youngest = self._active.pop()
        youngest.lease.release()
        self._waiting.appendleft(youngest)
        return []

    def _end(self, generation: Generation, text: str) -> list[Progress]:
        self._remove(generation)
        return [Progress(generation, text + generation.text.finish(), is_over=True)]

    def _fail(self, generations: list[Generation], error: BaseException) -> list[Progress]:
        failed = list(generations)
        for generation in failed:
            self._remove(generation)
        return [Progress(generation, is_over=True, error=error) for generation in failed]

    def _remove(self, generation: Generation) -> None:
        for answers in (self._active, self._waiting):
            if generation in answers:
                answers.remove(generation)
        self._owners.pop(id(generation), None)
        generation.lease.release()
