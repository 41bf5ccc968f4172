"""The right of one answer to a sequence of an engine, whose tokens `EngineScheduler` evaluates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import UsageError
from .protocol import Chunk
from .scheduling_policy import SequenceCache

if TYPE_CHECKING:
    from .scheduler import EngineScheduler

SEQUENCE_LOST = (
    "another answer started on this model; read one to its end first, load the model twice, or load it with "
    "--parallel for several answers"
)


class Lease:
    """The right of one answer to a sequence of the engine, until `release` or until other answers need the sequence."""

    def __init__(self, scheduler: EngineScheduler) -> None:
        self._scheduler = scheduler
        self.tokens: list[int] = []
        """All tokens of the answer's sequence, evaluated or not."""
        self.cache: SequenceCache | None = None
        """The evaluated tokens. None before the first pass. Only the scheduler writes to it."""
        self.cached_tokens = 0
        """Number of tokens that were cached already when the sequence was assigned."""
        self.is_interrupted = False
        self.draft: list[int] = []
        """Proposed tokens after `tokens`. The next pass evaluates those that fit and removes the others from here."""
        self.draft_start = 0
        """Number of tokens before a proposal that was evaluated, 0 if the cache has none but `tokens`."""

    def begin(self, tokens: Sequence[int]) -> None:
        """Replace the sequence by `tokens`, without evaluating them yet."""
        self.release()
        self.tokens, self.draft, self.draft_start = list(tokens), [], 0

    def append(self, token: int) -> None:
        """Append one token, without evaluating it yet."""
        self.tokens.append(token)

    @property
    def num_pending(self) -> int:
        """Return the number of tokens that are not evaluated yet, without proposed ones."""
        return len(self.tokens) - (0 if self.cache is None else len(self.cache.tokens))

    @property
    def has_sequence(self) -> bool:
        """Return True if the lease holds a sequence."""
        return self.cache is not None and self.cache.holder is self

    @property
    def is_lost(self) -> bool:
        """Return True if another answer took the sequence."""
        return self.cache is not None and not self.has_sequence

    def next_chunk(self, count: int) -> Chunk:
        """Return the first `count` pending and proposed tokens as part of a pass."""
        assert self.cache is not None
        begin = len(self.cache.tokens)
        room_for_draft = max(0, count - self.num_pending)
        self.draft = self.draft[:room_for_draft]
        self.draft_start = len(self.tokens) if self.draft else 0
        tokens = self.tokens[begin : begin + count] + self.draft
        reaches_end = begin + count >= len(self.tokens)
        return Chunk(self.cache.sequence, tokens, reaches_end, len(self.draft))

    def evaluate(self) -> np.ndarray:
        """Evaluate all pending tokens and return the last one's logits, fp32 [V]. See `EngineScheduler.step`."""
        while (logits := self._scheduler.step([self])[0]) is None:
            pass
        return logits

    def interrupt(self) -> bool:
        """Evaluate no more tokens of this lease; may be called from any thread.

        Return True if the lease takes part in the pass in progress. The pass ends as soon as the engine can if all of
        its leases are interrupted. Otherwise it ends as planned, because the others would lose their tokens.
        """
        self.is_interrupted = True
        return self._scheduler._interrupt(self)

    def release(self, keep: bool = False) -> None:
        """Make the sequence idle. Its tokens stay cached for prompts with the same prefix.

        With `keep`, `reacquire` may continue it.
        """
        with self._scheduler._turn:
            if self.cache is not None and self.cache.holder is self:  # another answer may hold it by now
                self.cache.holder = None
            if not keep:
                self.cache = None

    def reacquire(self) -> None:
        """Hold the sequence again after `release(keep=True)`. Raise UsageError if it was used in between."""
        with self._scheduler._open(), self._scheduler._turn:
            if self.cache is None or (self.cache.holder is None and not self.cache.tokens):
                self.cache = None  # parked: the next pass brings it back
                return
            # Another answer may have used the sequence and released it: then nobody holds it, but its tokens differ.
            if self.cache.holder is not None or self.cache.tokens != self.tokens:
                raise UsageError(SEQUENCE_LOST)
            self.cache.holder = self
