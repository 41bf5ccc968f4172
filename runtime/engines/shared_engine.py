"""Share one engine between threads: leases of its sequences, and passes over their tokens."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..base.errors import ContextOverflowError, UsageError
from .cache_pool import CachePool, Lease
from .pass_sizes import plan_pass
from .protocol import CacheFullError, Chunk, Engine, EvaluationInterrupted, PassTimer

MODEL_CLOSED = "the model is closed; load it again"


class SharedEngine:
    """A loaded `Engine` that any thread may use and any thread may close.

    Threads take turns to evaluate. Closing waits for the calls in progress, and later calls raise UsageError. Tokens
    are evaluated under a lease. There may be more leases than sequences: a further one takes the sequence that was not
    used for the longest time, and the lease that held it is lost.

    There are two locks. `changed` may be taken inside `_turn`, and never the other way round.
    """

    def __init__(self, engine: Engine) -> None:
        """Take over `engine`."""
        self._engine: Engine | None = engine
        self.changed = threading.Condition()
        """Guards the next two fields and the arrivals of `AnswerLoop`. Garbage collection may take it at any time."""
        self._num_calls = 0
        """Calls in progress."""
        self._in_pass: Sequence[Lease] = ()
        """Leases whose tokens are being evaluated."""
        self._turn = threading.RLock()
        """Held while tokens are evaluated or caches change."""
        self.pool = CachePool(engine, max_parked=engine.context_length)
        """The caches. They change within `caches` only."""
        self.num_leases = 0
        """Leases of the last pass."""
        self.traits, self.context_length = engine.traits, engine.context_length

    @contextlib.contextmanager
    def _open(self) -> Iterator[Engine]:
        """Yield the engine, which is not closed before the block ends. Raise UsageError if it is closed."""
        with self.changed:
            if self._engine is None:
                raise UsageError(MODEL_CLOSED)
            engine = self._engine
            self._num_calls += 1
        try:
            yield engine
        finally:
            with self.changed:
                self._num_calls -= 1
                if self._engine is None:
                    self.changed.notify_all()

    @property
    def num_sequences(self) -> int:
        """Return the number of answers that are computed together."""
        return self.pool.num_sequences

    @property
    def cache_slots(self) -> int:
        """Return the number of tokens of answers that the caches hold together."""
        return self.pool.slots

    @property
    def used_slots(self) -> int:
        """Return the number of tokens in the caches of answers in progress. Shared prefixes count once."""
        return self.pool.held

    @contextlib.contextmanager
    def caches(self) -> Iterator[CachePool]:
        """Yield the caches, which no other thread changes meanwhile."""
        with self._open(), self._turn:
            yield self.pool

    def begin(self, lease: Lease, tokens: Sequence[int]) -> None:
        """Replace the tokens of a lease, without evaluating them yet."""
        self.release(lease)
        lease.tokens, lease.draft, lease.draft_start = list(tokens), [], 0

    def release(self, lease: Lease) -> None:
        """Make the sequence of a lease idle. Its tokens stay cached for prompts with the same prefix."""
        with self._turn:
            self.pool.release(lease)

    def logits(self, lease: Lease) -> np.ndarray:
        """Evaluate all pending tokens of a lease and return the last one's logits, fp32 [V]. See `step`."""
        while (logits := self.step([lease])[0]) is None:
            pass
        return logits

    def step(self, leases: Sequence[Lease]) -> list[np.ndarray | None]:
        """Evaluate tokens of the leases in one pass, chosen by `plan_pass`.

        Return logits, fp32 [V], for every lease whose last token was evaluated, and None for the others. Those of a
        lease with n proposed tokens (`Lease.draft`) are [1 + n, V]. If a lease of the pass is interrupted before it, or
        all during it, nothing is evaluated and all are None. Raise UsageError if a lease lost its sequence,
        ContextOverflowError if its tokens do not fit, CacheFullError if the tokens of all leases do not fit together.
        """
        with self._open() as engine, self._turn:
            for lease in leases:
                self.check_length(lease.tokens)
            caches = [self.pool.cache_of(lease) for lease in leases]
            pending = [self.pool.num_pending(lease) for lease in leases]
            wanted = [number + len(lease.draft) for number, lease in zip(pending, leases, strict=True)]
            last_used = [cache.last_used for cache in caches]
            counts = plan_pass(wanted, last_used, engine.max_batch, self.traits.pass_times)
            planned = [index for index, count in enumerate(counts) if count]
            is_decoding = all(pending[index] == 1 for index in planned)
            chunks = [self.pool.take_chunk(leases[index], counts[index]) for index in planned]
            # Idle caches are evicted only now, so that they serve as prefixes as long as possible.
            self.pool.make_room(sum(counts))
            began = time.perf_counter()
            try:
                rows = iter(self._evaluate(engine, [leases[index] for index in planned], chunks))
            except EvaluationInterrupted:
                return [None] * len(leases)
            self.num_leases = len(planned)
            # A pass with prompt tokens says nothing about the cost of a proposed one.
            if self.traits.speculation is not None and is_decoding:
                self.traits.speculation.record_pass(sum(counts), 1e3 * (time.perf_counter() - began))
            logits: list[np.ndarray | None] = [None] * len(leases)
            for index, chunk in zip(planned, chunks, strict=True):
                self.pool.append(chunk.sequence, chunk.tokens)
                if chunk.wants_logits:  # the engine returns rows for these chunks only, in their order
                    logits[index] = next(rows)
            return logits

    def _evaluate(self, engine: Engine, leases: Sequence[Lease], chunks: Sequence[Chunk]) -> list[np.ndarray]:
        """Run one pass. Raise EvaluationInterrupted if one of `leases` is interrupted before it, or all during it."""
        with self.changed:
            if any(lease.is_interrupted for lease in leases):
                raise EvaluationInterrupted
            self._in_pass = leases
            engine.resume()
        try:
            return self._extend(engine, chunks)
        finally:
            with self.changed:
                self._in_pass = ()

    def _extend(self, engine: Engine, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        while True:
            try:
                return engine.extend(chunks)
            except CacheFullError:  # sequences with a shared prefix can take more slots than they are counted for
                if not self.pool.evict_idle():
                    raise

    def check_length(self, tokens: Sequence[int]) -> None:
        """Raise ContextOverflowError if `tokens` do not fit, ValueError if there are none."""
        if not tokens:
            raise ValueError("the prompt has no tokens; give at least one")
        if len(tokens) > self.context_length:
            raise ContextOverflowError(
                f"{len(tokens)} tokens do not fit the context window of {self.context_length}; "
                "shorten the text or load with a larger --context"
            )

    def interrupt(self, lease: Lease) -> bool:
        """Evaluate no more tokens of a lease. Any thread may call it.

        Return True if the lease takes part in the pass in progress. The pass ends as soon as the engine can if all of
        its leases are interrupted. Otherwise it ends as planned, because the others would lose their tokens.
        """
        lease.is_interrupted = True
        with self.changed:  # which keeps the engine open
            if self._engine is None or not any(one is lease for one in self._in_pass):
                return False
            if all(one.is_interrupted for one in self._in_pass):
                self._engine.interrupt()
            return True

    def measure_passes(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Measure passes if the engine can and has not done so, see `PassTimer`."""
        with self._open() as engine, self._turn:
            if isinstance(engine, PassTimer) and self.traits.pass_times is None:
                engine.measure_passes(should_stop)

    def close(self) -> None:
        """Free the model after the calls in progress. A second call does nothing."""
        with self.changed:
            engine, self._engine = self._engine, None
            if engine is None:
                return
            self.changed.wait_for(lambda: not self._num_calls)  # no call can start any more
        engine.close()
