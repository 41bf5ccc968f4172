"""`efficientllm-chat`: chat with an exported model in the terminal, or ask it one question."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .base import flags
from .base.command import show_messages
from .base.errors import UsageError
from .engines.artefact import ARTEFACT_HELP, open_or_export
from .engines.engine import EngineOptions, load_engine
from .sampling import SamplingOptions, number
from .terminal import ChatOptions, Conversation, Terminal

SMALL_MODEL_BYTES = 1_000_000_000
SMALL_MODEL_PENALTY = 1.1
"""Default penalty for models with smaller files, which repeat themselves. It is that of our pages and Modelfiles."""


@dataclass(frozen=True)
class ChatSampling(SamplingOptions):
    """Sampling."""

    temperature: float | None = number("temperature", None)
    """Divisor of the logits. 0: always the most likely token. Default: the model's own, else 0."""
    repetition_penalty: float | None = number("repetition_penalty", None)
    """Divide the logits of tokens already in the sequence by this (arXiv 1909.05858). 1: off. Default: the model's
    own, else 1.1 for files below 1 GB and 1 for larger ones."""


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        ChatOptions,
        ChatSampling,
        EngineOptions,
        prog="efficientllm-chat",
        examples=(
            'chat demo "Write one sentence about the sea."',
            "chat small-gguf --temperature 0.7 --max-tokens 100",
        ),
        description="Chat with an exported model. With a prompt or a pipe it answers once, otherwise interactively.",
    )
    parser.add_argument("artefact", help=ARTEFACT_HELP)
    parser.add_argument("prompt", nargs="?", help="question to answer once")
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments; the engine refuses text that is not UTF-8
    artefact, prompt = open_or_export(arguments.pop("artefact")), arguments.pop("prompt")
    options, sampling = flags.take(arguments, ChatOptions), flags.take(arguments, ChatSampling)
    engine_options = flags.take(arguments, EngineOptions)
    if options.stats:
        show_messages(details=True)
    place = ""
    if prompt is None and not sys.stdin.isatty():
        prompt, place = sys.stdin.read().strip(), " on standard input"
    if prompt == "":
        raise UsageError(f"the prompt{place} is empty")
    engine = load_engine(artefact, engine_options)
    engine.sampling_defaults.setdefault("temperature", 0.0)
    if artefact.file_bytes < SMALL_MODEL_BYTES:
        engine.sampling_defaults.setdefault("repetition_penalty", SMALL_MODEL_PENALTY)
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
