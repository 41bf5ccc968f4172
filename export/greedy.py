"""The first greedy tokens of an exported file on this machine: what another device must say, too."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from ..runtime.chat_template import render_chat
from ..runtime.engines.engine import EngineOptions, load_engine
from ..runtime.generation import AnswerOptions, Generation
from ..runtime.prompt import chat_prompt, text_prompt

CHECKED_TOKENS = 32
CONTEXT = 256
"""Tokens of context: question, template and answer fit many times over."""

QUESTION = "What is the capital of France?"
TEXT = "The capital of France is"
"""For models without a chat template."""


@dataclass(frozen=True)
class GreedyCheck:
    """A prompt and how the model goes on with it when it always takes the most likely token."""

    question: str
    """What was asked, before the chat template."""
    prompt: str
    """Rendered, control tokens as text, without the token that llama.cpp itself begins every text with."""
    prompt_tokens: list[int]
    """All that the model reads."""
    tokens: list[int]
    """As many as were asked for, fewer where the model ended its answer."""
    text: str


def greedy_check(model: Path, context: int = CONTEXT, count: int = CHECKED_TOKENS) -> GreedyCheck:
    """Run the file `model`, which holds `context` tokens or more, in our engine, on one thread, for `count` tokens."""
    with contextlib.closing(load_engine(model, EngineOptions(threads=1, context=min(context, CONTEXT)))) as engine:
        if engine.chat_template is None:
            question = prompt = TEXT
            tokens = text_prompt(engine, TEXT)
        else:
            question, messages = QUESTION, [{"role": "user", "content": QUESTION}]
            prompt = render_chat(engine.chat_template, messages, engine.bos_token, engine.eos_token)
            tokens = chat_prompt(engine, messages)
        if engine.adds_bos:
            prompt = prompt.removeprefix(engine.bos_token)
        generation = Generation(engine, tokens, AnswerOptions(count))
        text = "".join(generation)
    return GreedyCheck(question, prompt, tokens, generation.answer, text)
