"""Share one engine between threads and answers: leases of its sequences, and passes over their tokens.

The sequence of an answer is in one of these states:

    waiting  --step-->  leased  <--step-->  in a pass
                         |  ^
                 release |  | reacquire, or a prompt with the same prefix
                         v  |
                    idle (cached)  -->  parked or evicted

- waiting: the lease has tokens, but no sequence of the engine yet.
- leased: the lease holds a sequence, whose cache is kept until the release.
- in a pass: the engine evaluates tokens of the sequence at this moment.
- idle: no lease holds the sequence, but its tokens stay cached for later prompts.
- parked: the cache was copied to ordinary memory, and comes back for a prompt with the same prefix.
- evicted: the cache was emptied for other tokens. A lease whose sequence was taken is lost (`Lease.is_lost`).

`scheduling_policy` decides which cache is taken or evicted and how many tokens a pass evaluates. `Batch`
(`runtime/batch.py`) decides which answers take part, and `EngineWorker` (`server/models/worker.py`) runs a batch.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..base.errors import ContextOverflowError, UsageError
from .prompt_store import PromptStore
from .protocol import CacheFullError, Chunk, Embedder, Engine, EvaluationInterrupted, Pooling, StateKeeper
from .scheduling_policy import SEQUENCE_LOST, CachePool, PassTimer, PassTimes, SequenceCache, common_length, plan_pass
from .speculation import PromptLookup, Speculation

TOGETHER_SECONDS = 0.001
"""Longest time that a pass waits for the threads of the pass before."""

MODEL_CLOSED = "the model is closed; load it again"


class EngineScheduler:
    """A loaded `Engine` that any thread may use and any thread may close.

    Threads take turns to evaluate. Closing waits for the calls in progress, and later calls raise UsageError. Tokens
    are evaluated under a lease. There may be more leases than sequences: a further one takes the sequence that was not
    used for the longest time, and the lease that held it raises UsageError.

    `_stepping` is the innermost lock, taken inside `_turn` or `_calls`. Those two are never held together. `_own_turn`
    is taken before them. `_served` is the outermost one, in which garbage collection may take `_turn`.
    """

    def __init__(self, engine: Engine, sampling_defaults: Mapping[str, float] | None = None) -> None:
        """Take over `engine`. `sampling_defaults`: fields of SamplingOptions that the model's maker chose."""
        self._engine: Engine | None = engine
        self.sampling_defaults = dict(sampling_defaults or {})
        self._calls = threading.Condition()
        """Guards `_engine` and `_num_calls`."""
        self._num_calls = self._num_leases = 0
        """Calls in progress, and leases of the last pass."""
        self._turn = threading.RLock()
        """Held while tokens are evaluated. Reentrant, because garbage collection may release a lease meanwhile."""
        self._caches = CachePool(engine, max_parked=engine.context_length)
        self._stepping = threading.Lock()
        """Guards `_in_pass`."""
        self._served = threading.Condition()
        """Guards the next three fields. Notified after a pass, and when a thread asks for one."""
        self._is_serving, self._num_together = False, 1
        self._requests: list[_StepRequest] = []
        """Passes that threads wait for. `_num_together` of them were in the last one."""
        self._in_pass: Sequence[Lease] = ()
        """Leases whose tokens are being evaluated."""
        self._own_lease = Lease(self)
        """Sequence of `prefill` and `decode`. It is idle between two calls, because no call is known to be the last."""
        self._own_turn = threading.RLock()
        self.context_length, self.vocab_size, self.end_ids = engine.context_length, engine.vocab_size, engine.end_ids
        self.chat_template, self.adds_bos = engine.chat_template, engine.adds_bos
        self.bos_token, self.eos_token, self.control_texts = engine.bos_token, engine.eos_token, engine.control_texts
        self.load_ms, self.kv_cache_bytes, self.settings = engine.load_ms, engine.kv_cache_bytes, engine.settings
        self.num_sequences, self.cache_slots = engine.num_sequences, engine.cache_slots
        self.crowded_slots: int = getattr(engine, "crowded_slots", engine.cache_slots)
        self.parked_bytes = self._caches.max_parked * self.kv_cache_bytes // self.cache_slots
        """Memory that parked caches may take beside those of the engine."""
        self.cuts_sequences: bool = getattr(engine, "cuts_sequences", True)
        """False if a prompt reuses all cached tokens of a sequence or none."""
        self._pass_times: PassTimes | None = getattr(engine, "pass_times", None)
        self._speculation: Speculation | None = getattr(engine, "speculation", None)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Engine]:
        """Yield the engine, which is not closed before the block ends. Raise UsageError if it is closed."""
        with self._calls:
            if self._engine is None:
                raise UsageError(MODEL_CLOSED)
            engine = self._engine
            self._num_calls += 1
        try:
            yield engine
        finally:
            with self._calls:
                self._num_calls -= 1
                self._calls.notify_all()

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Return token ids, see `Engine.tokenize`. Raise UsageError for text that is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            reason = "a byte that is not UTF-8, or half of a surrogate pair"
            raise UsageError(f"the text has an invalid character: {reason}; remove it") from error
        with self._open() as engine:
            return engine.tokenize(text, special)

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, see `Engine.token_bytes`."""
        with self._open() as engine:
            return engine.token_bytes(token)

    def vocabulary(self) -> list[bytes]:
        """Return `token_bytes` of every token."""
        with self._open() as engine:
            return list(map(engine.token_bytes, range(self.vocab_size)))

    def embed(self, tokens: Sequence[int], pooling: Pooling) -> np.ndarray:
        """Return the embedding of a text, see `Embedder.embed`.

        Raise UsageError if the engine has no embeddings, ContextOverflowError if the tokens do not fit.
        """
        if len(tokens) > self.context_length:
            raise ContextOverflowError(
                f"{len(tokens)} tokens do not fit the context window of {self.context_length}; "
                "shorten the text or load with a larger --context"
            )
        with self._open() as engine:
            if not isinstance(engine, Embedder):
                raise UsageError("this engine has no embeddings; export the model with --target gguf")
            return engine.embed(tokens, pooling)

    def proposer(self, prompt: Sequence[int]) -> PromptLookup | None:
        """Return the proposals for an answer to `prompt`, None if the engine checks none."""
        return None if self._speculation is None else PromptLookup(self._speculation, prompt)

    def lease(self) -> Lease:
        """Return a new lease without tokens."""
        return Lease(self)

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Make `tokens` the sequence of `decode` and return the last one's logits, fp32 [V].

        A cached prefix is not evaluated again. Raise ContextOverflowError if the tokens do not fit.
        """
        with self._own_turn:  # over all calls below: another thread's tokens must not replace these in between
            self._own_lease.begin(tokens)
            logits = self._own_lease.evaluate()
            self._own_lease.release(keep=True)
            return logits

    def decode(self, token: int) -> np.ndarray:
        """Append one token to the sequence of `prefill` and return its logits, fp32 [V].

        Raise UsageError if another answer took the sequence.
        """
        with self._own_turn:
            self._own_lease.reacquire()
            self._own_lease.append(token)
            logits = self._own_lease.evaluate()
            self._own_lease.release(keep=True)
            return logits

    def evaluate(self, tokens: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """Yield the logits of positions `first`, `first` + 1, ... of `tokens`, see `Engine.evaluate`.

        All sequences of the engine are taken for it. Raise UsageError if another answer took one between two pieces.
        """
        holder, pieces, cache = object(), None, None
        while True:
            with self._open() as engine, self._turn:
                if pieces is None or cache is None:  # the first piece; the lock is free between two pieces
                    self._check_length(tokens)
                    cache = self._caches.hold_all(holder, tokens, first)
                    pieces = engine.evaluate(tokens, first, len(cache.tokens))
                    cache.tokens = []  # unknown until the last piece
                if cache.holder is not holder:
                    raise UsageError(SEQUENCE_LOST)
                rows = next(pieces, None)
                if rows is None:
                    cache.tokens = list(tokens)
                    self._caches.release_all(holder)
                    return
            yield rows

    def step_together(self, lease: Lease) -> np.ndarray | None:
        """Evaluate tokens of `lease` in one pass with those that other threads wait for, see `step`.

        One of the threads evaluates for all.
        """
        request = _StepRequest(lease)
        is_leader = False
        try:
            with self._served:
                self._requests.append(request)
                self._served.notify_all()
                self._served.wait_for(lambda: request.is_done or not self._is_serving)
                if not request.is_done:
                    is_leader = self._is_serving = True
            if is_leader:
                self._serve(self._choose_together(request))
        finally:
            # also after Ctrl-C in this thread: the others would otherwise wait for a leader that is gone
            with self._served:
                self._requests = [one for one in self._requests if one is not request]
                self._is_serving = self._is_serving and not is_leader
                self._served.notify_all()
        if request.error is not None:
            raise request.error
        return request.logits

    def _choose_together(self, request: _StepRequest) -> list[_StepRequest]:
        """Return the requests of the next pass, of which `request` is one."""
        with self._served:
            # The threads of the last pass are choosing their tokens now.
            self._served.wait_for(lambda: len(self._requests) >= self._num_together, TOGETHER_SECONDS)
            # A prompt without a sequence has a pass of its own, because it may take the sequence of another lease.
            together = [request]
            if request.lease.has_sequence:
                together = [one for one in self._requests if one.lease.has_sequence]
            self._requests = [one for one in self._requests if one not in together]
            self._num_together = len(together)
            return together

    def _serve(self, requests: Sequence[_StepRequest]) -> None:
        try:
            rows = self.step([request.lease for request in requests])
        except Exception as error:  # of one lease, or of all together
            # A failed pass changes no sequence, so each may be tried again by itself and keep its own error.
            for request in requests:
                if len(requests) > 1:
                    self._serve([request])
                else:
                    request.error, request.is_done = error, True
        else:
            for request, row in zip(requests, rows, strict=True):
                request.logits, request.is_done = row, True

    def step(self, leases: Sequence[Lease]) -> list[np.ndarray | None]:
        """Evaluate tokens of the leases in one pass, chosen by `plan_pass`.

        Return logits, fp32 [V], for every lease whose last token was evaluated, and None for the others. Those of a
        lease with n proposed tokens (`Lease.draft`) are [1 + n, V]. If a lease of the pass is interrupted before it, or
        all during it, nothing is evaluated and all are None. Raise UsageError if a lease lost its sequence,
        ContextOverflowError if its tokens do not fit, CacheFullError if the tokens of all leases do not fit together.
        """
        with self._open() as engine, self._turn:
            caches = [self._find_cache(lease) for lease in leases]
            pending = [lease.num_pending + len(lease.draft) for lease in leases]
            counts = plan_pass(pending, [cache.last_used for cache in caches], engine.max_batch, self._pass_times)
            planned = [(lease, count) for lease, count in zip(leases, counts, strict=True) if count]
            is_decoding = all(lease.num_pending == 1 for lease, _ in planned)
            chunks = [lease.next_chunk(count) for lease, count in planned]
            # Idle caches are evicted only now, so that they serve as prefixes as long as possible.
            self._caches.make_room(sum(counts))
            began = time.perf_counter()
            try:
                rows = iter(self._evaluate(engine, [lease for lease, _ in planned], chunks))
            except EvaluationInterrupted:
                return [None] * len(leases)
            self._num_leases = len(planned)
            # A pass with prompt tokens says nothing about the cost of a proposed one.
            if self._speculation is not None and is_decoding:
                self._speculation.record_pass(sum(counts), 1e3 * (time.perf_counter() - began))
            logits: dict[int, np.ndarray] = {}
            for (lease, _), chunk in zip(planned, chunks, strict=True):
                assert lease.cache is not None
                lease.cache.tokens += chunk.tokens
                self._caches.touch(lease.cache)
                if chunk.wants_logits:  # the engine returns rows for these chunks only, in their order
                    logits[id(lease)] = next(rows)
            return [logits.get(id(lease)) for lease in leases]

    def _evaluate(self, engine: Engine, leases: Sequence[Lease], chunks: Sequence[Chunk]) -> list[np.ndarray]:
        """Run one pass. Raise EvaluationInterrupted if one of `leases` is interrupted before it, or all during it."""
        with self._stepping:
            if any(lease.is_interrupted for lease in leases):
                raise EvaluationInterrupted
            self._in_pass = leases
            engine.resume()
        try:
            return self._extend(engine, chunks)
        finally:
            with self._stepping:
                self._in_pass = ()

    def _extend(self, engine: Engine, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        while True:
            try:
                return engine.extend(chunks)
            except CacheFullError:  # sequences with a shared prefix can take more slots than they are counted for
                if not self._caches.evict_idle():
                    raise

    def _find_cache(self, lease: Lease) -> SequenceCache:
        """Return the cache of a lease, assigned now if it has none."""
        if lease.cache is None:
            self._check_length(lease.tokens)
            lease.cache = self._caches.assign(lease, lease.tokens)
            lease.cached_tokens = len(lease.cache.tokens)
        elif lease.is_lost:
            raise UsageError(SEQUENCE_LOST)
        elif len(lease.tokens) > self.context_length:
            raise ContextOverflowError(
                f"the context window of {self.context_length} tokens is full; load with a larger --context"
            )
        elif lease.draft_start:
            self._remove_wrong_draft(lease, lease.cache)
        return lease.cache

    def _remove_wrong_draft(self, lease: Lease, cache: SequenceCache) -> None:
        """Remove the proposed tokens of the last pass that the answer does not have."""
        begin, lease.draft_start = lease.draft_start, 0
        answer = lease.tokens[begin:]
        right = common_length(cache.tokens[begin:], answer, len(answer))
        self._caches.truncate(cache, begin + right)

    def _check_length(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise ValueError("the prompt has no tokens; give at least one")
        if len(tokens) > self.context_length:
            raise ContextOverflowError(
                f"the prompt has {len(tokens)} tokens, the context window {self.context_length}; "
                "shorten the prompt or load with a larger --context"
            )

    def _interrupt(self, lease: Lease) -> bool:
        """End the pass in progress if `lease` takes part and nobody else needs it, see `Lease.interrupt`."""
        with self._calls, self._stepping:  # `_calls` keeps the engine open between the check and the call
            if self._engine is None or not any(one is lease for one in self._in_pass):
                return False
            if all(one.is_interrupted for one in self._in_pass):
                self._engine.interrupt()
            return True

    def draft(self, proposer: PromptLookup, longest: int) -> list[int]:
        """Return at most `longest` tokens that the next pass checks, [] if that gains nothing or they may not fit."""
        # Proposals must not fill the slots that the next tokens of all answers need.
        room = self.cache_slots - self._caches.held - self.num_sequences
        return proposer.draft(min(longest, room), self._num_leases)

    def prompt_store(self, folder: Path, model_hash: str, max_bytes: int) -> PromptStore | None:
        """Return the stored prompts of this model in `folder`, None if the engine has none. `model_hash`: its files."""
        with self._open() as engine:
            if not isinstance(engine, StateKeeper):
                return None
            return PromptStore(folder, f"{model_hash}, {engine.state_format}", max_bytes)

    def pin(self, tokens: Sequence[int]) -> None:
        """Evaluate `tokens` and never evict them. They take a sequence and its slots from the answers.

        Raise UsageError without a second sequence, ContextOverflowError if the tokens do not fit.
        """
        if self.num_sequences < 2:
            raise UsageError("--pin: a pinned prompt needs a sequence of its own; set --parallel to 2 or more")
        lease = self.lease()
        lease.begin(tokens)
        lease.evaluate()
        assert lease.cache is not None
        lease.cache.is_pinned = True
        lease.release()
        self.num_sequences, self.cache_slots = self.num_sequences - 1, self.cache_slots - len(tokens)

    @contextlib.contextmanager
    def caches(self) -> Iterator[CachePool]:
        """Yield the caches, which no pass changes meanwhile."""
        with self._open(), self._turn:
            yield self._caches

    def measure_passes(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Measure passes if the engine can and has not done so, see `PassTimer`."""
        with self._open() as engine, self._turn:
            if isinstance(engine, PassTimer) and engine.pass_times is None:
                engine.measure_passes(should_stop)
                self._pass_times, self.settings = engine.pass_times, engine.settings

    @property
    def used_slots(self) -> int:
        """Return the number of tokens in the caches of answers in progress. Shared prefixes count once."""
        return self._caches.held

    def close(self) -> None:
        """Free the model after the calls in progress. A second call does nothing."""
        with self._calls:
            engine, self._engine = self._engine, None
            if engine is None:
                return
            self._calls.wait_for(lambda: not self._num_calls)  # no call can start any more
        engine.close()


@dataclass(eq=False)
class _StepRequest:
    """A pass that a thread waits for, and its result."""

    lease: Lease
    logits: np.ndarray | None = None
    error: Exception | None = None
    is_done: bool = False


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
