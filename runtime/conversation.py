"""A conversation in the terminal: its messages, and streaming the next answer."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import flags
from .base.errors import UsageError
from .base.quantities import format_bytes
from .engines.memory import memory_bytes
from .engines.owned import OwnedEngine
from .generation import AnswerOptions, Generation, GenerationStats, Overflow
from .prompt import chat_prompt
from .sampling import SamplingOptions


@dataclass(frozen=True)
class ChatOptions:
    """chat"""

    max_tokens: int = 256
    """Longest answer in tokens."""
    system: str = ""
    """System prompt; the template's own where empty."""
    stats: bool = False
    """Print the figures of each answer to stderr."""
    overflow: Overflow = "error"
    """Where the chat outgrows the context window: error, or slide (forget the oldest tokens)."""
    history: bool = True
    """Keep questions for the next session (arrow up), in the cache folder."""

    def __post_init__(self) -> None:
        flags.require(self, "max_tokens", self.max_tokens >= 1, "must be positive")


class Conversation:
    """Messages so far, and answering the next one."""

    def __init__(self, engine: OwnedEngine, options: ChatOptions, sampling: SamplingOptions) -> None:
        self.engine = engine
        self.options = options
        self.sampling = sampling
        self.system = options.system
        self.last_stats: GenerationStats | None = None
        self.messages: list[dict[str, str]] = []
        """Questions and answers in turn."""

    def ask(self, text: str) -> bool:
        """Stream the answer to stdout and remember it; a refused question leaves the conversation as it was.

        Ctrl-C ends the answer, of which what is there is kept; without any, the question is forgotten. Returns whether
        the answer came to its end.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        options = AnswerOptions(self.options.max_tokens, self.sampling, overflow=self.options.overflow)
        generation = Generation(self.engine, chat_prompt(self.engine, [*system, *messages]), options)
        pieces = []
        with _ended_by_interrupt(generation):
            for piece in generation:
                pieces.append(piece)
                print(piece, end="", flush=True)
        print(" [stopped]" if generation.is_cancelled else "", flush=True)
        if pieces or not generation.is_cancelled:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        self.last_stats = generation.stats
        if self.options.stats:
            print(self.describe_stats(), file=sys.stderr)
        return not generation.is_cancelled

    def ask_again(self) -> bool:
        """Answer the last question anew, as `ask`; the answer that it had stays until there is another."""
        before = self.messages
        question = self.forget_last()
        try:
            return self.ask(question)
        finally:
            if len(self.messages) < len(before):
                self.messages = before

    def forget_last(self) -> str:
        """Take back the last question and its answer; UsageError where there is none."""
        if not self.messages:
            raise UsageError("nothing was asked yet")
        question = self.messages[-2]["content"]
        self.messages = self.messages[:-2]
        return question

    def save(self, path: Path) -> None:
        """Write the conversation as Markdown."""
        parts = [f"**{message['role']}**\n\n{message['content']}\n" for message in self.messages]
        path.write_text("\n".join(parts), encoding="utf-8")

    def describe_stats(self) -> str:
        """The last answer's figures in one line."""
        stats = self.last_stats
        if stats is None:
            return f"load {self.engine.load_ms:.0f} ms; no answer yet"
        return (
            f"load {self.engine.load_ms:.0f} ms, time to first token {stats.time_to_first_token_ms:.0f} ms "
            f"({stats.prompt_tokens} prompt tokens, {stats.cached_tokens} of them cached), "
            f"decode {stats.decode_tokens_per_second:.1f} tokens/s "
            f"({stats.completion_tokens} tokens, {stats.finish_reason}), "
            f"prefill {stats.prefill_tokens_per_second:.0f} tokens/s, "
            f"peak RSS {format_bytes(memory_bytes()['peak_rss_bytes'])}, "
            f"KV cache {format_bytes(self.engine.kv_cache_bytes)}"
            + (f", {self.engine.settings}" if self.engine.settings else "")
            + (
                f", grammar {1e3 * stats.mask_seconds / stats.completion_tokens:.3f} ms a token"
                if stats.mask_seconds
                else ""
            )
        )


@contextlib.contextmanager
def _ended_by_interrupt(generation: Generation) -> Iterator[None]:
    """Ctrl-C ends `generation` at its next token instead of raising amid an engine's work; a second one raises."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if generation.is_cancelled:
            raise KeyboardInterrupt
        generation.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
