"""The interactive chat of `efficientllm-chat`: a conversation and its commands."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .base import flags
from .base.errors import EfficientLLMError, UsageError
from .base.quantities import format_bytes
from .engines.memory import memory_bytes
from .engines.scheduler import EngineScheduler
from .generation import AnswerOptions, Generation, GenerationStats, Overflow
from .prompt import chat_prompt
from .sampling import SamplingOptions


@dataclass(frozen=True)
class ChatOptions:
    """Chat."""

    max_tokens: int = flags.number(256, at_least=1)
    """Largest number of tokens of an answer."""
    system: str = ""
    """System prompt. Empty: that of the chat template."""
    stats: bool = False
    """Print token counts and speeds of each answer to stderr."""
    overflow: Overflow = "error"
    """At the end of the context window: error, or slide (drop the oldest tokens)."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


class Conversation:
    """Messages of a chat, and the generation of the next answer."""

    def __init__(self, engine: EngineScheduler, options: ChatOptions, sampling: SamplingOptions) -> None:
        self.engine = engine
        self.options = options
        self.sampling = sampling
        self.system = options.system
        self.last_stats: GenerationStats | None = None
        self.messages: list[dict[str, str]] = []
        """Questions and answers, alternating."""

    def ask(self, text: str) -> bool:
        """Stream the answer to stdout and store it. Return True unless Ctrl-C ended it.

        An answer that Ctrl-C ends is stored as far as it was generated. An empty one removes the question as well.
        """
        # a copy: a question that the template refuses leaves the conversation as it was
        messages = [*self.messages, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        options = AnswerOptions(self.options.max_tokens, self.sampling, overflow=self.options.overflow)
        generation = Generation(self.engine, chat_prompt(self.engine, [*system, *messages]), options)
        pieces = []
        with _cancelled_by_interrupt(generation):
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
        """Answer the last question again as `ask` does. The old answer is kept until a new one exists."""
        before = self.messages
        question = self.remove_last()
        try:
            return self.ask(question)
        finally:
            if len(self.messages) < len(before):
                self.messages = before

    def remove_last(self) -> str:
        """Remove the last question and its answer, and return the question. Raises UsageError without one."""
        if not self.messages:
            raise UsageError("there is no question yet; ask one first")
        question = self.messages[-2]["content"]
        self.messages = self.messages[:-2]
        return question

    def describe_stats(self) -> str:
        """Return load time, token counts, speeds and memory of the last answer in one line."""
        stats = self.last_stats
        if stats is None:
            return f"load {self.engine.load_ms:.0f} ms; no answer yet"
        parts = [
            f"load {self.engine.load_ms:.0f} ms",
            f"time to first token {stats.time_to_first_token_ms:.0f} ms "
            f"({stats.prompt_tokens} prompt tokens, {stats.cached_tokens} of them cached)",
            f"decode {stats.decode_tokens_per_second:.1f} tokens/s "
            f"({stats.completion_tokens} tokens, {stats.finish_reason})",
            f"prefill {stats.prefill_tokens_per_second:.0f} tokens/s",
            f"peak RSS {format_bytes(memory_bytes()['peak_rss_bytes'])}",
            f"KV cache {format_bytes(self.engine.kv_cache_bytes)}",
        ]
        if self.engine.settings:
            parts.append(self.engine.settings)
        if stats.mask_seconds:
            parts.append(f"grammar {1e3 * stats.mask_seconds / stats.completion_tokens:.3f} ms a token")
        return ", ".join(parts)


@contextlib.contextmanager
def _cancelled_by_interrupt(generation: Generation) -> Iterator[None]:
    """Let Ctrl-C end `generation` at its next token instead of raising inside an engine. A second one raises."""
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


QUOTES = '"""'
"""Line that begins and ends a question of several lines."""

PASTE_SECONDS = 0.02
"""Input that follows a line within this time belongs to the same paste."""

HELP = f"""/again      answer the last question again
/undo       remove the last question and its answer
/reset      start a new conversation
/system X   set the system prompt to X (empty: that of the chat template)
/stats      token counts and speeds of the last answer
/quit       quit (or exit, quit, Ctrl-D)
A line that ends with \\ continues in the next. {QUOTES} begins and ends a question of several lines.
Pasted lines are one question. Ctrl-C ends an answer, or clears the line."""


class Terminal:
    """Reads questions and commands until the user quits."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self._readline = _readline()
        self._commands: dict[str, Callable[[str], object]] = {
            "help": lambda rest: print(HELP),
            "again": lambda rest: conversation.ask_again(),
            "undo": lambda rest: print(f"removed: {conversation.remove_last()}"),
            "reset": lambda rest: conversation.messages.clear(),
            "system": lambda rest: setattr(conversation, "system", rest),
            "stats": lambda rest: print(conversation.describe_stats()),
        }

    def run(self) -> None:
        """Answer until /quit or the end of the input."""
        print("/help lists commands; Ctrl-C ends an answer, Ctrl-D quits", file=sys.stderr)
        while True:
            try:
                text = self._read()
                if text in ("/quit", "/exit", "quit", "exit"):
                    return
                if text:
                    self._run_line(text)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
            except EfficientLLMError as error:  # the session continues after a bad question
                print(f"error: {error}", file=sys.stderr)

    def _run_line(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        if not text.startswith("/") or not name.isalpha():
            self.conversation.ask(text)
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            raise UsageError(f"there is no command /{name}; /help lists them")

    def _read(self) -> str:
        """Return one question, which may have several lines."""
        line = input("> ")
        if line.strip() == QUOTES:
            lines = []
            while (line := input(". ")).strip() != QUOTES:
                lines.append(line)
            return "\n".join(lines).strip()
        lines = [line]
        while lines[-1].endswith("\\") or self._has_more():
            if lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
            lines.append(input(". "))
        return "\n".join(lines).strip()

    def _has_more(self) -> bool:
        """Return True if more lines were pasted, for terminals whose line editor does not combine them itself."""
        if self._readline is not None or os.name != "posix":
            return False
        return bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])


def _readline() -> Any:
    """Return GNU readline, which combines pasted lines, or None if it is not installed."""
    try:
        import readline  # absent on Windows
    except ImportError:
        return None
    if "libedit" in (readline.__doc__ or ""):
        return None
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
    return readline
