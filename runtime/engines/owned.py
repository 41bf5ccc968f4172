"""An engine with one owner: native code is entered by one thread at a time and never after it was freed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..base.errors import ContextOverflowError, UsageError
from .lease import Caches, Lease, shares
from .protocol import CacheFullError, Embedder, Engine, EvaluationInterrupted, Part, PassTimes, Pooling, Timed

CLOSED = "the model is closed; load it again"
TAKEN = (
    "another answer was begun on this model: read one to its end, load the model twice, or load it with room for "
    "several (--parallel)"
)


class OwnedEngine:
    """An `Engine` that any thread may use and any thread may close.

    Evaluating takes turns; closing waits for the call in progress, and every later call is a UsageError. Whoever
    evaluates a sequence does it in a `lease`, which keeps its cache until it is released; as many as the engine has
    sequences stand side by side, and one more takes the longest unused one's, who is told.
    """

    def __init__(self, engine: Engine, sampling_defaults: Mapping[str, float] | None = None) -> None:
        """`sampling_defaults`: fields of SamplingOptions that the model's maker chose."""
        self._engine: Engine | None = engine
        self.sampling_defaults = dict(sampling_defaults or {})
        self._calls = threading.Condition()
        """Guards the number of calls in progress and whether the engine is there."""
        self._num_calls = 0
        self._turn = threading.RLock()
        """Held while tokens are evaluated; a thread may come back for it, where a lease is collected meanwhile."""
        self._caches = Caches(engine)
        self._stepping = threading.Lock()
        """Guards whose tokens are being evaluated."""
        self._evaluated: Sequence[Lease] = ()
        self._own = Lease(self)
        """The sequence of `prefill` and `decode`; nobody's between two calls, as they never say that they are done."""
        self._own_turn = threading.RLock()
        self.context_length, self.vocab_size, self.end_ids = engine.context_length, engine.vocab_size, engine.end_ids
        self.chat_template, self.adds_bos = engine.chat_template, engine.adds_bos
        self.bos_token, self.eos_token, self.control_texts = engine.bos_token, engine.eos_token, engine.control_texts
        self.load_ms, self.kv_cache_bytes, self.settings = engine.load_ms, engine.kv_cache_bytes, engine.settings
        self.num_sequences, self.cache_slots = engine.num_sequences, engine.cache_slots
        self._pass_times = engine.pass_times if isinstance(engine, Timed) else None

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
        """See Engine; UsageError for text that is none: with bytes that were no UTF-8, or halves of surrogate pairs."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            reason = "a byte that is no UTF-8, or half of a surrogate pair"
            raise UsageError(f"the text holds what is no character: {reason}") from error
        with self._open() as engine:
            return engine.tokenize(text, special)

    def token_bytes(self, token: int) -> bytes:
        """See Engine."""
        with self._open() as engine:
            return engine.token_bytes(token)

    def vocabulary(self) -> list[bytes]:
        """`token_bytes` of every token."""
        with self._open() as engine:
            return list(map(engine.token_bytes, range(self.vocab_size)))

    def embed(self, tokens: Sequence[int], pooling: Pooling) -> np.ndarray:
        """See Embedder; UsageError where the engine is none, ContextOverflowError where the tokens do not fit."""
        if len(tokens) > self.context_length:
            raise ContextOverflowError(f"{len(tokens)} tokens do not fit the context window of {self.context_length}")
        with self._open() as engine:
            if not isinstance(engine, Embedder):
                raise UsageError("this model's engine shows logits only: embeddings are a GGUF's")
            return engine.embed(tokens, pooling)

    def lease(self) -> Lease:
        """A sequence of one's own."""
        return Lease(self)

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Make `tokens` the sequence and return the last one's logits, fp32 [V]; what a cache holds of them is reused.

        ContextOverflowError where they do not fit.
        """
        with self._own_turn:
            self._own.begin(tokens)
            logits = self._own.evaluate()
            self._own.release(keep=True)
            return logits

    def decode(self, token: int) -> np.ndarray:
        """Append one token to that sequence and return its logits; UsageError where another one was begun."""
        with self._own_turn:
            self._own.take_again()
            self._own.append(token)
            logits = self._own.evaluate()
            self._own.release(keep=True)
            return logits

    def evaluate(self, tokens: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """See Engine; UsageError where somebody else came between two pieces."""
        holder, pieces, cache = object(), None, None
        while True:
            with self._open() as engine, self._turn:
                if pieces is None or cache is None:
                    self._check_length(tokens)
                    cache = self._caches.take_all(holder, tokens, first)
                    pieces = engine.evaluate(tokens, first, len(cache.tokens))
                    cache.tokens = []  # not known while it goes on
                if cache.holder is not holder:
                    raise UsageError(TAKEN)
                rows = next(pieces, None)
                if rows is None:
                    cache.tokens = list(tokens)
                    self._caches.give_back(holder)
                    return
            yield rows

    def step(self, leases: Sequence[Lease]) -> list[np.ndarray | None]:
        """Evaluate more of the leases' tokens in one pass; logits, fp32 [V], of those whose last one was reached.

        Leases that want one token get it, or take turns where the engine knows that fewer in a pass are faster; the
        rest of the pass goes to the prompts in their order, little of it where others wait for their next token.
        Nothing is evaluated of a lease that is interrupted meanwhile, nor of the others. UsageError where a lease lost
        its cache (`is_lost`), ContextOverflowError where its tokens do not fit, CacheFullError where those of all do
        not.
        """
        with self._open() as engine, self._turn:
            for lease in leases:
                self._find_cache(lease)
            each = shares([lease.num_pending for lease in leases], engine.max_batch)
            if self._pass_times is not None:
                _leave_out(leases, each, self._pass_times)
            working = [lease for lease, share in zip(leases, each, strict=True) if share]
            parts = [lease.next_part(share) for lease, share in zip(leases, each, strict=True) if share]
            self._caches.make_room(sum(each))
            try:
                rows = iter(self._evaluate(engine, working, parts))
            except EvaluationInterrupted:
                return [None] * len(leases)
            found: dict[int, np.ndarray] = {}
            for lease, part in zip(working, parts, strict=True):
                assert lease.cache is not None
                lease.cache.tokens += part.tokens
                self._caches.touch(lease.cache)
                if part.wants_logits:
                    found[id(lease)] = next(rows)
            return [found.get(id(lease)) for lease in leases]

    def _evaluate(self, engine: Engine, leases: Sequence[Lease], parts: Sequence[Part]) -> list[np.ndarray]:
        """One pass; EvaluationInterrupted where one of `leases` is interrupted before or meanwhile."""
        with self._stepping:
            if any(lease.is_interrupted for lease in leases):
                raise EvaluationInterrupted
            self._evaluated = leases
            engine.resume()
        try:
            return self._extend(engine, parts)
        finally:
            with self._stepping:
                self._evaluated = ()

    def _extend(self, engine: Engine, parts: Sequence[Part]) -> list[np.ndarray]:
        while True:
            try:
                return engine.extend(parts)
            except CacheFullError:  # sequences that share their beginning count less than they may take
                if not self._caches.empty_idle():
                    raise

    def _find_cache(self, lease: Lease) -> None:
        """See that a lease has its cache."""
        if lease.cache is None:
            self._check_length(lease.tokens)
            lease.cache = self._caches.assign(lease, lease.tokens)
            lease.cached_tokens = len(lease.cache.tokens)
        elif lease.is_lost:
            raise UsageError(TAKEN)
        elif len(lease.tokens) > self.context_length:
            raise ContextOverflowError(
                f"the context window of {self.context_length} tokens is full; load with a larger --context"
            )

    def _check_length(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise ValueError("a sequence needs at least one token")
        if len(tokens) > self.context_length:
            raise ContextOverflowError(
                f"the prompt has {len(tokens)} tokens, the context window {self.context_length}; "
                "shorten the prompt or load with a larger --context"
            )

    def release(self, lease: Lease, keep: bool) -> None:
        """See Lease."""
        with self._turn:
            if lease.cache is not None and lease.cache.holder is lease:
                lease.cache.holder = None
            if not keep:
                lease.cache = None

    def take_again(self, lease: Lease) -> None:
        """See Lease."""
        with self._open(), self._turn:
            cache = lease.cache
            if cache is not None and (cache.holder is not None or cache.tokens != lease.tokens):
                raise UsageError(TAKEN)
            if cache is not None:
                cache.holder = lease

    def interrupt(self, lease: Lease) -> bool:
        """See Lease."""
        with self._calls:  # else it could be closed between the look and the call
            engine = self._engine
            with self._stepping:
                takes_part = engine is not None and any(one is lease for one in self._evaluated)
                if engine is not None and takes_part:
                    engine.interrupt()
        return takes_part

    @property
    def used_slots(self) -> int:
        """Tokens in the caches of answers that are being computed."""
        return self._caches.held

    def close(self) -> None:
        """Free the model when the calls in progress have ended; a second time does nothing."""
        with self._calls:
            engine, self._engine = self._engine, None
            if engine is None:
                return
            self._calls.wait_for(lambda: not self._num_calls)
        engine.close()


def _leave_out(leases: Sequence[Lease], each: list[int], times: PassTimes) -> None:
    """Leave out of `each` what other passes evaluate sooner: next tokens of those that had theirs last, or, where
    nobody waits for one, what a few tokens of a single prompt (a chat's next short question) are faster without."""
    waiting = [index for index, lease in enumerate(leases) if lease.num_pending == 1]
    prompts = [index for index, share in enumerate(each) if share]
    if waiting:
        number = times.answers(len(waiting), sum(each) - len(waiting))
        for index in sorted(waiting, key=lambda index: _last_used(leases[index]))[number:]:
            each[index] = 0
    elif len(prompts) == 1 and each[prompts[0]] <= times.largest:
        each[prompts[0]] = times.answers(each[prompts[0]])


def _last_used(lease: Lease) -> int:
    """When its cache was: of two, the one that waits longer has the smaller number."""
    assert lease.cache is not None
    return lease.cache.last_used
