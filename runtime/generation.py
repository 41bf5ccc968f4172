"""Generate text with an engine in a loop of prefill, sampling and decode, and measure it. V is the vocabulary size."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from .base import flags
from .base.errors import ContextOverflowError, UsageError
from .engines.cache_pool import Lease
from .engines.scheduler import EngineScheduler
from .sampling import Sampler, SamplingOptions, log_sum, ranked
from .text_stream import TextStream


class Constraint(Protocol):
    """Restricts the next token of one answer. Grammars implement it."""

    @property
    def is_complete(self) -> bool:
        """Return True if no token can follow. The answer then ends without an end token."""
        ...

    def mask(self, logits: np.ndarray) -> None:
        """Set forbidden tokens in the fp32 `logits` [V] to -inf, in place.

        The end tokens are forbidden unless the answer may end here. All tokens may be forbidden.
        """
        ...

    def push(self, token: int) -> None:
        """Add the chosen `token`, which the mask allowed and which is not an end token."""
        ...

    def forced_tokens(self) -> list[int]:
        """Return the tokens that must follow, [] if there is a choice. They are appended without their logits."""
        ...


Overflow = Literal["error", "slide"]

SINK_TOKENS = 32
"""First tokens that a sliding window keeps, because they act as attention sinks (arXiv 2309.17453)."""

MAX_REPEATS = 64
"""Times that one token in a row ends an answer which nothing else limits. Small models may repeat without end."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token, before sampling options."""

    token: int
    logprob: float | None
    """None for the first token of a prompt."""
    top: tuple[tuple[int, float], ...]
    """(token, log-probability) of the most likely tokens, best first."""


@dataclass
class GenerationStats:
    """Token counts and times of one answer."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were in the KV cache already."""
    prefilled_tokens: int = 0
    """Prompt tokens that were evaluated, neither cached nor dropped from the window."""
    completion_tokens: int = 0
    drafted_tokens: int = 0
    """Proposed tokens that passes checked."""
    accepted_tokens: int = 0
    """Proposed tokens that became part of the answer."""
    passes: int = 0
    """Evaluations whose logits chose a token. The tokens that a grammar forces need none."""
    first_tokens: int = 0
    """Tokens that the first pass made known: the chosen one and forced ones."""
    time_to_first_token_ms: float = 0.0
    """Time from the call to the first token: the prefill and the sampling."""
    decode_seconds: float = 0.0
    """Time for the tokens of later passes: evaluation, mask, sampling and detokenization."""
    mask_seconds: float = 0.0
    """Time of the constraint for the masks of all tokens."""
    log_probability: float = 0.0
    """Sum of the log-probabilities of the chosen tokens in nats, before a grammar (with `measures_probability`)."""
    chosen_tokens: int = 0
    """Tokens of that sum: neither end tokens nor those that a grammar forces."""
    finish_reason: str = ""
    """"stop" (end token or stop string) or "length"."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Return the speed of the prefill, over the tokens that were evaluated."""
        return self.prefilled_tokens / (self.time_to_first_token_ms / 1e3) if self.time_to_first_token_ms else 0.0

    @property
    def mean_probability(self) -> float | None:
        """Return the geometric mean of the probabilities of the chosen tokens, None if there are none."""
        return math.exp(self.log_probability / self.chosen_tokens) if self.chosen_tokens else None

    @property
    def decode_tokens_per_second(self) -> float:
        later_tokens = self.completion_tokens - self.first_tokens
        return later_tokens / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class AnswerOptions:
    """Options of one answer."""

    max_tokens: int = flags.number(256, at_least=0)
    """Largest number of generated tokens. 0: the prompt is only evaluated."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """Sampling options. Those that are None have the model's values (`EngineScheduler.sampling_defaults`)."""
    stop: Sequence[str] = ()
    """Strings that end the answer and are not part of it."""
    stop_until: str = ""
    """Text, such as the marker of a call, after which `stop` is ignored."""
    top_logprobs: int | None = None
    """Record the log-probability of every token and of this many best ones (see `Generation.pop_logprobs`)."""
    measures_probability: bool = False
    """Measure `GenerationStats.mean_probability`."""
    scores_prompt: bool = False
    """Record the log-probabilities of the prompt's tokens as well. Needs `top_logprobs`, and the prompt must fit."""
    overflow: Overflow = "error"
    """At the end of the context window, "error" refuses a prompt without room for an answer and ends the answer.
    "slide" drops the oldest tokens except the first few."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """{token: number added to its logit}. -inf forbids the token."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


class Generation:
    """One answer: iterate for pieces of text, then read `answer` and `stats`.

    The engine computes for an iteration only while its next piece is awaited. Iteration raises UsageError if another
    answer takes the sequence between two pieces, or if the engine is closed.
    """

    def __init__(
        self,
        engine: EngineScheduler,
        prompt: Sequence[int],
        options: AnswerOptions | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """Prepare an answer to the token ids `prompt`, restricted by `constraint`.

        Raises ContextOverflowError if the prompt does not fit and may not slide. Raises UsageError for a bias on a
        token outside the vocabulary.
        """
        options = options or AnswerOptions()
        if len(prompt) >= engine.context_length and (options.overflow == "error" or options.scores_prompt):
            raise ContextOverflowError(
                f"the prompt has {len(prompt)} tokens and leaves no room in the context window of "
                f"{engine.context_length}; shorten it or load with a larger --context",
                len(prompt),
                engine.context_length,
            )
        if unknown := [token for token in options.logit_bias if not 0 <= token < engine.vocab_size]:
            raise UsageError(f"logit_bias: token {unknown[0]} is outside the vocabulary of {engine.vocab_size}")
        self.engine = engine
        self.is_cancelled = False
        """True after `cancel`."""
        self.is_over = False
        """True if no further token is needed."""
        self.lease = Lease()
        """Requests the evaluation of `tokens`. The caller that evaluates it passes the logits to `accept`."""
        self._token_start = 0.0
        self._unscored = deque(prompt[1:] if options.scores_prompt else ())
        """Tokens of the prompt whose log-probabilities are not known yet."""
        self.tokens = list(prompt[: len(prompt) - len(self._unscored)])
        """Input of the next token: prompt and answer without the tokens that were dropped from the window."""
        self.answer: list[int] = []
        self.top_logprobs, self._measures_probability = options.top_logprobs, options.measures_probability
        self.constraint = constraint
        # Log-probabilities need the logits of every token, and a bias may forbid a forced one.
        self._may_force = constraint is not None and options.top_logprobs is None and not options.logit_bias
        self._opening = ""
        """Text of forced tokens that precede the first pass."""
        self._logprobs = [TokenLogprob(prompt[0], None, ())] if options.scores_prompt else []
        room = engine.context_length - len(prompt)
        self.max_tokens = options.max_tokens if options.overflow == "slide" else min(options.max_tokens, room)
        self._is_unlimited = options.max_tokens > room
        self.sampler = Sampler(options.sampling.with_defaults(engine.sampling_defaults), prompt, options.logit_bias)
        self.text = TextStream(options.stop, options.stop_until)
        self._proposer = engine.proposer(prompt)
        self.stats = GenerationStats(prompt_tokens=len(prompt), finish_reason="length")

    def __iter__(self) -> Iterator[str]:
        return self.engine.answers.read(self, is_pulled=True)

    def whole(self) -> str:
        """Return all of the text. The answer waits for its turn, and none takes its sequence."""
        return "".join(self.engine.answers.read(self, is_pulled=False))

    def begin(self) -> None:
        """Request the evaluation of all tokens so far, at the start or after the KV cache was lost.

        The answer `is_over` already if a grammar forces all of it.
        """
        if len(self.tokens) >= self.engine.context_length:
            self._slide()
        self.engine.begin(self.lease, self.tokens)
        if not self.answer:
            self._opening = self._append_forced()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start the time of the next token."""
        self._token_start = time.perf_counter()

    def cancel(self) -> bool:
        """End the answer within one token, also during a long prefill. Any thread may call it.

        Return True if a pass of the engine still computes for the answer, see `SharedEngine.interrupt`.
        """
        self.is_cancelled = self.is_over = True
        return self.engine.interrupt(self.lease)

    def accept(self, logits: np.ndarray) -> str:
        """Sample the next token from fp32 logits [V], which may be overwritten, and return the text to show.

        With n proposed tokens the logits are [1 + n, V]. A row is used if the answer has all proposed tokens before it.
        Requests the evaluation of the last token unless the answer `is_over`.
        """
        rows, draft, begin = np.atleast_2d(logits), self.lease.draft, len(self.lease.tokens)
        is_scoring = bool(self._unscored)
        if not self.stats.passes:
            prompt = len(self.tokens) + len(self._unscored) - len(self.answer)
            self.stats.cached_tokens = min(self.lease.cached_tokens, prompt)  # forced tokens may be cached, too
            self.stats.prefilled_tokens = prompt - self.stats.cached_tokens
        piece, num_right = self._accept_row(rows[0]), 0
        while not self.is_over:
            # one further token, or several that a grammar forces; none if the window slid
            number = len(self.lease.tokens) - begin
            if not 0 < number <= len(draft):
                break
            if self.lease.tokens[begin + num_right :] != draft[num_right:number]:
                break
            num_right = number
            piece += self._accept_row(rows[number])
        if not is_scoring:
            self.stats.drafted_tokens += len(draft)
            self.stats.accepted_tokens += num_right
        self._propose()
        if not self._unscored:
            self._count_time()
        piece, self._opening = self._opening + piece, ""
        return piece

    def _accept_row(self, logits: np.ndarray) -> str:
        """Sample a token from fp32 logits [V] and return the text of it and of forced tokens after it.

        While tokens of the prompt are to be scored, the next of them is taken instead, without text.
        """
        if self._unscored and self.top_logprobs is not None:
            token = self._unscored.popleft()
            self._logprobs.append(token_logprob(logits, token, self.top_logprobs))
            self.tokens.append(token)
            self.lease.tokens.append(token)
            return ""
        if not self.max_tokens:
            self.is_over = True
            return ""
        token = None if self.is_cancelled else self._choose(logits)
        piece = self._append(token) if token is not None else self._stop()
        return piece + self._append_forced()

    def _propose(self) -> None:
        """Let the next pass check proposed tokens if that is expected to be faster."""
        self.lease.draft = []
        if self._unscored:
            self.lease.draft = list(itertools.islice(self._unscored, self.engine.traits.max_rows - 1))
        elif self._proposer is not None and not self.is_over:
            room = self.engine.context_length - len(self.tokens)
            left = self.max_tokens - self.stats.completion_tokens - 1  # the pass itself gives one token more
            self.lease.draft = self.engine.draft(self._proposer, min(room, left))

    def _append_forced(self) -> str:
        """Append the tokens that the constraint forces, and return the text to show."""
        if self.is_over or self.constraint is None or not self._may_force or not self.max_tokens:
            return ""
        text = ""
        for token in self.constraint.forced_tokens():
            if self.is_over:
                break
            text += self._append(token)
        return text

    def finish(self) -> str:
        """Return the text that was held back, at the end of the answer."""
        return self._opening + self.text.finish()

    def _append(self, token: int) -> str:
        if token in self.engine.end_ids:
            return self._stop()
        self.tokens.append(token)
        self.answer.append(token)
        self.sampler.push(token)
        if self._proposer is not None:
            self._proposer.push(token)
        if self.constraint is not None:
            self.constraint.push(token)
        self.stats.completion_tokens += 1
        piece = self.text.push(self.engine.token_bytes(token))
        # stop strings and grammars before the limit: an answer that ends with its last token has the reason "stop"
        if self.text.stopped or (self.constraint is not None and self.constraint.is_complete):
            self._stop()
        elif self.stats.completion_tokens >= self.max_tokens or (self._is_unlimited and self._repeats()):
            self.is_over = True
        elif len(self.tokens) <= self.engine.context_length:
            self.lease.tokens.append(token)
        else:
            self._slide()
            self.engine.begin(self.lease, self.tokens)
        return piece

    def _repeats(self) -> bool:
        return self.answer[-MAX_REPEATS:] == self.answer[-1:] * MAX_REPEATS

    def _stop(self) -> str:
        self.is_over = True
        if not self.is_cancelled:
            self.stats.finish_reason = "stop"
        return ""

    def _choose(self, logits: np.ndarray) -> int | None:
        """Return the next token, None if the constraint forbids all."""
        # log-probabilities are those of the model, and mask, biases and penalties change the logits in place
        changes = self.constraint is not None or self.sampler.changes_logits
        is_scored = self.top_logprobs is not None or self._measures_probability
        found = logits.copy() if is_scored and changes else logits
        if self.constraint is not None:
            began = time.perf_counter()
            self.constraint.mask(logits)
            self.stats.mask_seconds += time.perf_counter() - began
            if logits.max() == -np.inf:
                return None
        token = self.sampler.choose(logits)
        if token in self.engine.end_ids:
            return token
        if self.top_logprobs is not None:
            self._logprobs.append(token_logprob(found, token, self.top_logprobs))
        if not self._measures_probability:
            return token
        # log-probabilities and biases evaluate forced tokens as well, which show no choice of the model
        if self.constraint is None or self._may_force or not self.constraint.forced_tokens():
            self.stats.log_probability += float(found[token]) - log_sum(found)
            self.stats.chosen_tokens += 1
        return token

    def _count_time(self) -> None:
        now = time.perf_counter()
        seconds, self._token_start = now - self._token_start, now
        self.stats.passes += 1
        if self.stats.passes == 1:
            self.stats.first_tokens = self.stats.completion_tokens
            self.stats.time_to_first_token_ms = 1e3 * seconds
        else:
            self.stats.decode_seconds += seconds

    def _slide(self) -> None:
        """Drop the oldest half of the window except its first tokens."""
        # half of it at once: the positions of all later tokens change, so they are evaluated again
        room = self.engine.context_length // 2
        sink = min(SINK_TOKENS, room // 2)
        last = room - sink
        self.tokens = self.tokens[:sink] + self.tokens[len(self.tokens) - last :]

    def pop_logprobs(self) -> list[TokenLogprob]:
        """Return and clear the records of the tokens since the last call."""
        records, self._logprobs = self._logprobs, []
        return records


def token_logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """Return the log-probability of `token` under fp32 `logits` [V], and those of the `top` best tokens."""
    best = ranked(logits, top) if top else np.empty(0, np.intp)
    values = logits[[token, *best]].astype(np.float64) - log_sum(logits)
    others = zip(best.tolist(), values[1:].tolist(), strict=True)
    return TokenLogprob(token, float(values[0]), tuple(others))
