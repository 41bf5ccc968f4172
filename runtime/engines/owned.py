"""An engine with one owner: native code is entered by one thread at a time and never after it was freed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..base.errors import UsageError
from .prefix import reusable_prefix
from .protocol import Engine

CLOSED = "the model is closed; load it again"
TAKEN = "another answer was begun on this model: read one to its end, or load the model twice"

PREFILL_STEP = 512
"""Prompt tokens between two looks at whether the answer is still wanted."""


class OwnedEngine:
    """An `Engine` that any thread may use and any thread may close.

    Evaluating takes turns; closing waits for the call in progress, and every later call is a UsageError. Whoever
    evaluates several tokens one after the other does it in a `lease`, which says where somebody else came between.
    """

    def __init__(self, engine: Engine, sampling_defaults: Mapping[str, float] | None = None) -> None:
        """`sampling_defaults`: fields of SamplingOptions that the model's maker chose."""
        self._engine: Engine | None = engine
        self.sampling_defaults = dict(sampling_defaults or {})
        self._calls = threading.Condition()
        """Guards the number of calls in progress and whether the engine is there."""
        self._num_calls = 0
        self._turn = threading.Lock()
        """Held while tokens are evaluated."""
        self._holder: object = None
        """Whose sequence the cache holds."""
        self._tokens: list[int] = []
        """The sequence that the cache holds."""
        self.context_length, self.vocab_size, self.end_ids = engine.context_length, engine.vocab_size, engine.end_ids
        self.chat_template, self.adds_bos = engine.chat_template, engine.adds_bos
        self.bos_token, self.eos_token = engine.bos_token, engine.eos_token
        self.load_ms, self.kv_cache_bytes = engine.load_ms, engine.kv_cache_bytes

    @contextlib.contextmanager
    def _open(self) -> Iterator[Engine]:
        """The engine, which stays as long as the block runs."""
        with self._calls:
            if self._engine is None:
                raise UsageError(CLOSED)
            engine = self._engine
            self._num_calls += 1
        try:
            yield engine
        finally:
            with self._calls:
                self._num_calls -= 1
                self._calls.notify_all()

    def tokenize(self, text: str, special: bool) -> list[int]:
        """See Engine."""
        with self._open() as engine:
            return engine.tokenize(text, special)

    def token_bytes(self, token: int) -> bytes:
        """See Engine."""
        with self._open() as engine:
            return engine.token_bytes(token)

    def lease(self) -> Lease:
        """A sequence of one's own."""
        return Lease(self)

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """See Engine."""
        return self._prefill(tokens, None)

    def decode(self, token: int) -> np.ndarray:
        """See Engine; UsageError where the sequence is a lease's."""
        return self._decode(token, None)

    def evaluate(self, tokens: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """See Engine; UsageError where somebody else came between two pieces."""
        holder, pieces = object(), None
        while True:
            with self._open() as engine, self._turn:
                if pieces is None:
                    pieces, self._holder = engine.evaluate(tokens, first), holder
                self._require(holder)
                self._tokens = []  # not known while it goes on
                rows = next(pieces, None)
                if rows is None:
                    self._holder, self._tokens = None, list(tokens)
                    return
            yield rows

    def _prefill(self, tokens: Sequence[int], holder: object) -> np.ndarray:
        with self._open() as engine, self._turn:
            self._holder, self._tokens = holder, []
            logits = engine.prefill(tokens)
            self._tokens = list(tokens)
            return logits

    def _decode(self, token: int, holder: object) -> np.ndarray:
        with self._open() as engine, self._turn:
            self._require(holder)
            logits = engine.decode(token)
            self._tokens.append(token)
            return logits

    def _require(self, holder: object) -> None:
        if self._holder is not holder:
            raise UsageError(TAKEN)

    def _num_cached(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` a prefill need not evaluate."""
        with self._turn:
            return reusable_prefix(self._tokens, tokens, self.context_length)

    def close(self) -> None:
        """Free the model when the calls in progress have ended; a second time does nothing."""
        with self._calls:
            engine, self._engine = self._engine, None
            if engine is None:
                return
            self._calls.wait_for(lambda: not self._num_calls)
        engine.close()


class Lease:
    """One sequence on an engine, until another one is begun there."""

    def __init__(self, engine: OwnedEngine) -> None:
        self._engine = engine
        self.cached_tokens = 0
        """Of the last prefill, what the cache held already."""

    def prefill(self, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        """Make `tokens` the sequence: logits [V] after every PREFILL_STEP new tokens, those of the last one at the end.

        Whoever stops iterating leaves the rest unevaluated. ContextOverflowError where they do not fit.
        """
        self.cached_tokens = self._engine._num_cached(tokens)
        for end in range(self.cached_tokens + PREFILL_STEP, len(tokens), PREFILL_STEP):
            yield self._engine._prefill(tokens[:end], self)
        yield self._engine._prefill(tokens, self)

    def decode(self, token: int) -> np.ndarray:
        """Append one token and return its logits, fp32 [V]; UsageError where another sequence was begun."""
        return self._engine._decode(token, self)
