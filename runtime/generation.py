"""Generating text with an engine: the loop of prefill, sample, decode, and what it measured.

What an answer may be, token by token: the seam between the loop of `generation` and grammars.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from .base import flags
from .base.errors import ContextOverflowError, UsageError
from .engines.scheduler import EngineScheduler
from .sampling import Sampler, SamplingOptions, log_sum, ranked
from .text_stream import TextStream


class Constraint(Protocol):
    """The tokens that one answer may go on with; it is asked and told between two tokens. V is the vocabulary size."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow: the answer ends here, without an end token."""
        ...

    def mask(self, logits: np.ndarray) -> None:
        """Set what may not come next in the fp32 `logits` [V] to -inf, in place: everything where nothing may.

        The end tokens are to be left alone only where the answer may end.
        """
        ...

    def push(self, token: int) -> None:
        """`token`, which the mask allowed and which does not end the answer, was chosen."""
        ...


Overflow = Literal["error", "slide"]

SINK_TOKENS = 32
"""Tokens at the start that a sliding window keeps: attention leans on the first ones (arXiv 2309.17453)."""


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token and how likely the model found it, before sampling options."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, log-probability) of the most likely ones, best first."""


@dataclass
class GenerationStats:
    """Figures of one answer."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, what the cache held already."""
    prefilled_tokens: int = 0
    """Of the prompt, what was evaluated: neither cached nor slid out of the window."""
    completion_tokens: int = 0
    time_to_first_token_ms: float = 0.0
    """From the call to the first token: the prefill and its choice."""
    decode_seconds: float = 0.0
    """Time spent on the tokens after the first: evaluating, masking, choosing, making text of them."""
    mask_seconds: float = 0.0
    """Of all tokens, what the constraint took to say what may come next."""
    finish_reason: str = ""
    """stop (end token or stop string) or length."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Of the tokens that were evaluated."""
        return self.prefilled_tokens / (self.time_to_first_token_ms / 1e3) if self.time_to_first_token_ms else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class AnswerOptions:
    """What an answer may be."""

    max_tokens: int = flags.number(256, at_least=1)
    """Tokens generated at most."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """What it leaves open is the model's own (`EngineScheduler.sampling_defaults`)."""
    stop: Sequence[str] = ()
    """Texts that end the answer and are not part of it."""
    stop_until: str = ""
    """Where this text begins, a call's marker say, `stop` counts no more."""
    top_logprobs: int | None = None
    """Record every token's log-probability and those of this many best ones (see `Generation.take_logprobs`)."""
    overflow: Overflow = "error"
    """Where the context window ends: "error" refuses a prompt that leaves no room and ends the answer there, "slide"
    forgets the oldest tokens but the first few."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """{token: number added to its logit}; -inf forbids it."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


class Generation:
    """One answer, streamed: iterate for pieces of text, then read `answer` and `stats`.

    UsageError where another answer is begun on the engine before this one ends, or the engine is closed.
    """

    def __init__(
        self,
        engine: EngineScheduler,
        prompt: Sequence[int],
        options: AnswerOptions | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """`prompt` are token ids. `constraint`: only tokens it accepts.

        ContextOverflowError where the prompt does not fit, unless it may slide; UsageError for a bias on a token that
        there is not.
        """
        options = options or AnswerOptions()
        if len(prompt) >= engine.context_length and options.overflow == "error":
            raise ContextOverflowError(
                f"the prompt has {len(prompt)} tokens and leaves no room in the context window of "
                f"{engine.context_length}; shorten it or load with a larger --context"
            )
        if unknown := [token for token in options.logit_bias if not 0 <= token < engine.vocab_size]:
            raise UsageError(f"logit_bias: token {unknown[0]} is outside the vocabulary of {engine.vocab_size}")
        self.engine = engine
        self.is_cancelled = False
        """See `cancel`."""
        self.is_over = False
        """Whether no further token is wanted."""
        self.lease = engine.lease()
        """Asked for `tokens`; whoever evaluates it gives the logits to `accept`."""
        self._marked = 0.0
        self.tokens = list(prompt)
        """What the next token is computed from: the prompt and the answer, less what has slid out of the window."""
        self.answer: list[int] = []
        self.top_logprobs = options.top_logprobs
        self.constraint = constraint
        self._logprobs: list[TokenLogprob] = []
        room = engine.context_length - len(prompt)
        self.max_tokens = options.max_tokens if options.overflow == "slide" else min(options.max_tokens, room)
        self.sampler = Sampler(options.sampling.filled(engine.sampling_defaults), prompt, options.logit_bias)
        self.text = TextStream(options.stop, options.stop_until)
        self.stats = GenerationStats(prompt_tokens=len(prompt), finish_reason="length")

    def __iter__(self) -> Iterator[str]:
        try:
            self.begin()
            while (logits := self._evaluate()) is not None:
                piece = self.accept(logits)
                if piece:
                    yield piece
                    self.mark()
            if piece := self.text.finish():
                yield piece
        finally:
            self.lease.release()

    def _evaluate(self) -> np.ndarray | None:
        """Logits after `tokens`; None where no more are wanted."""
        while not self.is_over:
            if (logits := self.engine.step([self.lease])[0]) is not None:
                return logits
        return None

    def begin(self) -> None:
        """Ask the lease for the prompt, or again for all there is so far, where its cache was lost."""
        if len(self.tokens) >= self.engine.context_length:
            self._slide()
        self.lease.begin(self.tokens)
        self.mark()

    def mark(self) -> None:
        """The next token's time counts from now."""
        self._marked = time.perf_counter()

    def cancel(self) -> bool:
        """End the answer within a token, or amid a long prompt; from any thread.

        Whether a pass of the engine is still computing for it, which ends as soon as it can.
        """
        self.is_cancelled = self.is_over = True
        return self.lease.interrupt()

    def accept(self, logits: np.ndarray) -> str:
        """Choose the token after `tokens` from its fp32 logits [V], which it may overwrite; text to be shown now.

        The lease is asked for the token, unless the answer `is_over`.
        """
        token = None if self.is_cancelled else self._choose(logits)
        if not self.answer:
            self.stats.cached_tokens = self.lease.cached_tokens
            self.stats.prefilled_tokens = len(self.tokens) - self.stats.cached_tokens
        piece = self._take(token) if token is not None else self._stop()
        self._count_time()
        return piece

    def _take(self, token: int) -> str:
        if token in self.engine.end_ids:
            return self._stop()
        self.tokens.append(token)
        self.answer.append(token)
        self.sampler.push(token)
        if self.constraint is not None:
            self.constraint.push(token)
        self.stats.completion_tokens += 1
        piece = self.text.push(self.engine.token_bytes(token))
        if self.text.stopped or (self.constraint is not None and self.constraint.is_complete):
            self._stop()
        elif self.stats.completion_tokens >= self.max_tokens:
            self.is_over = True
        elif len(self.tokens) <= self.engine.context_length:
            self.lease.append(token)
        else:
            self._slide()
            self.lease.begin(self.tokens)
        return piece

    def _stop(self) -> str:
        self.is_over = True
        if not self.is_cancelled:
            self.stats.finish_reason = "stop"
        return ""

    def _choose(self, logits: np.ndarray) -> int | None:
        """The next token; None where the constraint accepts none."""
        changes = self.constraint is not None or self.sampler.changes_logits
        found = logits.copy() if self.top_logprobs is not None and changes else logits
        if self.constraint is not None:
            began = time.perf_counter()
            self.constraint.mask(logits)
            self.stats.mask_seconds += time.perf_counter() - began
            if logits.max() == -np.inf:
                return None
        token = self.sampler.choose(logits)
        if self.top_logprobs is not None and token not in self.engine.end_ids:
            self._logprobs.append(token_logprob(found, token, self.top_logprobs))
        return token

    def _count_time(self) -> None:
        """What the token took."""
        now = time.perf_counter()
        seconds, self._marked = now - self._marked, now
        if self.stats.completion_tokens > 1:
            self.stats.decode_seconds += seconds
        elif not self.stats.time_to_first_token_ms:
            self.stats.time_to_first_token_ms = 1e3 * seconds

    def _slide(self) -> None:
        """Forget the oldest half of the window, but for its first tokens."""
        room = self.engine.context_length // 2
        sink = min(SINK_TOKENS, room // 2)
        self.tokens = self.tokens[:sink] + self.tokens[len(self.tokens) - (room - sink) :]

    def take_logprobs(self) -> list[TokenLogprob]:
        """Records of the tokens since the last call."""
        taken, self._logprobs = self._logprobs, []
        return taken


def token_logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """Log-probability of `token` under fp32 `logits` [V], and the `top` best ones."""
    best = ranked(logits, top) if top else np.empty(0, np.intp)
    values = logits[[token, *best]].astype(np.float64) - log_sum(logits)
    return TokenLogprob(token, float(values[0]), tuple(zip(best.tolist(), values[1:].tolist(), strict=True)))
