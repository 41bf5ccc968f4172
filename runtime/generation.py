"""Generating text with an engine: the loop of prefill, sample, decode, and what it measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .base import flags
from .base.errors import ContextOverflowError
from .chat_template import Message, render_chat
from .engines.owned import OwnedEngine
from .json_constraint import JsonConstraint
from .sampling import Sampler, SamplingOptions, log_softmax
from .text_stream import TextStream

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
    """From the call to the first token's logits: the prefill."""
    decode_seconds: float = 0.0
    """Time spent on the tokens after the first."""
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

    max_tokens: int = 256
    """Tokens generated at most."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: Sequence[str] = ()
    """Texts that end the answer and are not part of it."""
    top_logprobs: int | None = None
    """Record every token's log-probability and those of this many best ones (see `Generation.take_logprobs`)."""
    overflow: Overflow = "error"
    """Where the context window ends: "error" refuses a prompt that leaves no room and ends the answer there, "slide"
    forgets the oldest tokens but the first few."""

    def __post_init__(self) -> None:
        flags.check_types(self)
        flags.require(self, "max_tokens", self.max_tokens >= 1, "must be positive")


class Generation:
    """One answer, streamed: iterate for pieces of text, then read `answer` and `stats`.

    UsageError where another answer is begun on the engine before this one ends, or the engine is closed.
    """

    def __init__(
        self,
        engine: OwnedEngine,
        prompt: Sequence[int],
        options: AnswerOptions | None = None,
        constraint: JsonConstraint | None = None,
    ) -> None:
        """`prompt` are token ids. `constraint`: only tokens it accepts.

        ContextOverflowError where the prompt does not fit, unless it may slide.
        """
        options = options or AnswerOptions()
        if len(prompt) >= engine.context_length and options.overflow == "error":
            raise ContextOverflowError(
                f"the prompt has {len(prompt)} tokens and leaves no room in the context window of "
                f"{engine.context_length}; shorten it or load with a larger --context"
            )
        self.engine = engine
        self.is_cancelled = False
        """Set by any thread: the answer ends before its next token, or amid a long prompt."""
        self._lease = engine.lease()
        self.tokens = list(prompt)
        """What the next token is computed from: the prompt and the answer, less what has slid out of the window."""
        self.answer: list[int] = []
        self.top_logprobs = options.top_logprobs
        self.constraint = constraint
        self._logprobs: list[TokenLogprob] = []
        room = engine.context_length - len(prompt)
        self.max_tokens = options.max_tokens if options.overflow == "slide" else min(options.max_tokens, room)
        self.sampler = Sampler(options.sampling)
        self.text = TextStream(options.stop)
        self.stats = GenerationStats(prompt_tokens=len(prompt))

    def __iter__(self) -> Iterator[str]:
        began = time.perf_counter()
        logits = self._prefill()
        self.stats.time_to_first_token_ms = (time.perf_counter() - began) * 1e3
        self.stats.cached_tokens = self._lease.cached_tokens
        self.stats.prefilled_tokens = len(self.tokens) - self.stats.cached_tokens
        self.stats.finish_reason = "length"
        while logits is not None and self.stats.completion_tokens < self.max_tokens:
            token = self._choose(logits)
            if self.is_cancelled:
                break
            if token is None or token in self.engine.end_ids:
                self.stats.finish_reason = "stop"
                break
            if self.top_logprobs is not None:
                self._logprobs.append(token_logprob(logits, token, self.top_logprobs))
            self.tokens.append(token)
            self.answer.append(token)
            self.stats.completion_tokens += 1
            if piece := self.text.push(self.engine.token_bytes(token)):
                yield piece
            if self.text.stopped or (self.constraint is not None and self.constraint.is_complete):
                self.stats.finish_reason = "stop"
                break
            if self.stats.completion_tokens < self.max_tokens:
                began = time.perf_counter()
                has_room = len(self.tokens) <= self.engine.context_length
                logits = self._lease.decode(token) if has_room else self._prefill()
                self.stats.decode_seconds += time.perf_counter() - began
        if piece := self.text.finish():
            yield piece

    def _prefill(self) -> np.ndarray | None:
        """Logits after `tokens`, the oldest of which go where they do not fit; None where the answer is cancelled."""
        if len(self.tokens) >= self.engine.context_length:
            self._slide()
        last = None
        for logits in self._lease.prefill(self.tokens):
            last = logits
            if self.is_cancelled:
                return None
        return last

    def _choose(self, logits: np.ndarray) -> int | None:
        """The next token; None where the constraint accepts no more."""
        if self.constraint is None:
            return self.sampler.sample(logits, self.tokens)
        logits = logits.copy()
        while np.isfinite(logits.max()) and not self.is_cancelled:
            token = self.sampler.sample(logits, self.tokens)
            if token not in self.engine.end_ids and self.constraint.push(self.engine.token_bytes(token)):
                return token
            logits[token] = -np.inf
        return None

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
    """Log-probability of `token` under `logits` [V], and the `top` best ones."""
    log_probs = log_softmax(logits)
    best = np.argsort(-log_probs, kind="stable")[:top]
    return TokenLogprob(token, float(log_probs[token]), tuple((int(one), float(log_probs[one])) for one in best))


def chat_prompt(engine: OwnedEngine, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat, ready for the assistant's answer."""
    text = render_chat(engine.chat_template, messages, engine.bos_token, engine.eos_token)
    tokens = engine.tokenize(text, special=True)
    if engine.adds_bos and not text.startswith(engine.bos_token):
        tokens = engine.tokenize(engine.bos_token, special=True) + tokens
    return tokens


def text_prompt(engine: OwnedEngine, text: str) -> list[int]:
    """Token ids of a text that is to go on; what looks like a control token is text. [] where there is nothing."""
    tokens = engine.tokenize(text, special=False)
    # a model that knows no BOS by habit still needs one token to begin with
    begins = engine.tokenize(engine.bos_token, special=True) if engine.adds_bos or not tokens else []
    return begins + tokens
