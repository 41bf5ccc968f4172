"""`efficientllm-chat`: chat with an exported model in the terminal, or ask it one question."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from .base import flags
from .base.command import run_command
from .base.errors import UsageError
from .engines.engine import EngineOptions, load_engine
from .sampling import SamplingOptions
from .terminal import ChatOptions, Conversation, Terminal


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        ChatOptions,
        SamplingOptions,
        EngineOptions,
        prog="efficientllm-chat",
        description="Chat with an exported model. With a prompt or a pipe it answers once, otherwise interactively.",
    )
    parser.add_argument("artefact", help="folder written by efficientllm-export, or a .gguf or .pte file")
    parser.add_argument("prompt", nargs="?", help="question to answer once")
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    artefact, prompt = arguments.pop("artefact"), arguments.pop("prompt")
    options, sampling = flags.take(arguments, ChatOptions), flags.take(arguments, SamplingOptions)
    engine_options = flags.take(arguments, EngineOptions)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments; the engine refuses text that is not UTF-8
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise UsageError("the prompt on standard input is empty")
    engine = load_engine(artefact, engine_options)
    try:
        conversation = Conversation(engine, options, sampling)
        if prompt is not None:
            if not conversation.ask(prompt):
                raise KeyboardInterrupt  # for the exit code of an interrupted command
        else:
            Terminal(conversation).run()
    finally:
        engine.close()
    return 0


def main() -> None:
    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
