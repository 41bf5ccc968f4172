"""Generating text with an engine: the loop of prefill, sample, decode, and what it measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .chat_template import Message, render_chat
from .engine import Engine
from .errors import ContextOverflowError
from .sampling import Sampler, SamplingOptions
from .text_stream import TextStream


@dataclass
class GenerationStats:
    """Figures of one answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    time_to_first_token_ms: float = 0.0
    """From the call to the first token's logits: the prefill."""
    decode_seconds: float = 0.0
    """Time spent on the tokens after the first."""
    finish_reason: str = ""
    """stop (end token or stop string) or length."""

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / (self.time_to_first_token_ms / 1e3) if self.time_to_first_token_ms else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


class Generation:
    """One answer, streamed: iterate for pieces of text, then read `stats`."""

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: SamplingOptions | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        """`prompt` are token ids; at most `max_tokens` are generated, fewer where the context window ends."""
        if len(prompt) >= engine.context_length:
            raise ContextOverflowError(
                f"the prompt has {len(prompt)} tokens and leaves no room in the context window of "
                f"{engine.context_length}; shorten it or load with a larger --context"
            )
        self.engine = engine
        self.tokens = list(prompt)
        self.max_tokens = min(max_tokens, engine.context_length - len(prompt))
        self.sampler = Sampler(sampling or SamplingOptions())
        self.text = TextStream(stop)
        self.stats = GenerationStats(prompt_tokens=len(prompt))

    def __iter__(self) -> Iterator[str]:
        began = time.perf_counter()
        logits = self.engine.prefill(self.tokens)
        first = time.perf_counter()
        self.stats.time_to_first_token_ms = (first - began) * 1e3
        self.stats.finish_reason = "length"
        while self.stats.completion_tokens < self.max_tokens:
            token = self.sampler.sample(logits, self.tokens)
            if token in self.engine.end_ids:
                self.stats.finish_reason = "stop"
                break
            self.tokens.append(token)
            self.stats.completion_tokens += 1
            if piece := self.text.push(self.engine.token_bytes(token)):
                yield piece
            if self.text.stopped:
                self.stats.finish_reason = "stop"
                break
            if self.stats.completion_tokens < self.max_tokens:
                began = time.perf_counter()
                logits = self.engine.decode(token)
                self.stats.decode_seconds += time.perf_counter() - began
        if piece := self.text.finish():
            yield piece


def chat_prompt(engine: Engine, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat, ready for the assistant's answer."""
    text = render_chat(engine.chat_template, messages, engine.bos_token, engine.eos_token)
    tokens = engine.tokenize(text, special=True)
    if engine.adds_bos and not text.startswith(engine.bos_token):
        tokens = engine.tokenize(engine.bos_token, special=True) + tokens
    return tokens
