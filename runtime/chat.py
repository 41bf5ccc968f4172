"""`efficientllm-chat`: talk to an artefact in the terminal, or ask it one thing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .base import flags
from .base.command import run_command
from .base.errors import EfficientLLMError, UsageError
from .base.quantities import format_bytes
from .engines.engine import EngineOptions, load_engine
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

    def __post_init__(self) -> None:
        flags.require(self, "max_tokens", self.max_tokens >= 1, "must be positive")


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        ChatOptions,
        SamplingOptions,
        EngineOptions,
        prog="efficientllm-chat",
        description="Chat with an exported model. With a prompt (or a pipe) it answers once; else it is interactive.",
    )
    parser.add_argument("artefact", help="folder written by efficientllm-export, or a .gguf or .pte file")
    parser.add_argument("prompt", nargs="?", help="a question to answer once")
    return parser


class Conversation:
    """Messages so far, and answering the next one."""

    def __init__(self, engine: OwnedEngine, options: ChatOptions, sampling: SamplingOptions) -> None:
        self.engine = engine
        self.options = options
        self.sampling = sampling
        self.last_stats: GenerationStats | None = None
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, str]] = []
        if self.options.system:
            self.messages.append({"role": "system", "content": self.options.system})

    def ask(self, text: str) -> None:
        """Stream the answer to stdout and remember it; a refused question leaves the conversation as it was."""
        messages = [*self.messages, {"role": "user", "content": text}]
        options = AnswerOptions(self.options.max_tokens, self.sampling, overflow=self.options.overflow)
        generation = Generation(self.engine, chat_prompt(self.engine, messages), options)
        pieces = []
        for piece in generation:
            pieces.append(piece)
            print(piece, end="", flush=True)
        print(flush=True)
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        self.last_stats = generation.stats
        if self.options.stats:
            print(self.describe_stats(), file=sys.stderr)

    def describe_stats(self) -> str:
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
        )


def _interact(conversation: Conversation) -> None:
    with contextlib.suppress(ImportError):  # absent on Windows
        import readline  # noqa: F401  line editing and history for input()
    print("/reset starts anew, /stats shows figures, /quit leaves", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            conversation.reset()
        elif text == "/stats":
            print(conversation.describe_stats())
        elif text:
            try:
                conversation.ask(text)
            except EfficientLLMError as error:  # the question is at fault, not the session
                print(f"error: {error}", file=sys.stderr)


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    artefact, prompt = arguments.pop("artefact"), arguments.pop("prompt")
    options, sampling = flags.take(arguments, ChatOptions), flags.take(arguments, SamplingOptions)
    engine_options = flags.take(arguments, EngineOptions)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise UsageError("the prompt on standard input is empty")
    engine = load_engine(artefact, engine_options)
    try:
        conversation = Conversation(engine, options, sampling)
        if prompt is not None:
            conversation.ask(prompt)
        else:
            _interact(conversation)
    finally:
        engine.close()
    return 0


def main() -> None:
    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
