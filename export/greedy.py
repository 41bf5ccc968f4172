"""Record the first greedy tokens of an exported file on this machine, for comparison on another device."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from ..runtime.chat_template import render_chat
from ..runtime.engines.engine import EngineOptions, load_engine
from ..runtime.engines.scheduler import EngineScheduler
from ..runtime.generation import AnswerOptions, Generation
from ..runtime.prompt import chat_prompt, text_prompt

CHECKED_TOKENS = 32
CONTEXT = 256
"""Tokens of context, several times the length of question, template and answer."""

QUESTIONS = (
    "What are the months of the year?",
    "List the days of the week.",
    "Count from one to thirty.",
    "What is the capital of France?",
)
"""Candidates. Among questions answered in whole characters (engines show half ones differently), the one with the
widest margin is used, because kernels of other processors round differently."""
TEXTS = (
    "The months of the year are January, February, March,",
    "Monday, Tuesday, Wednesday,",
    "1, 2, 3, 4, 5, 6,",
    "The capital of France is",
)
"""Prompts for models without a chat template."""


@dataclass(frozen=True)
class GreedyCheck:
    """A prompt and the model's greedy continuation."""

    question: str
    """Question before the chat template."""
    prompt: str
    """Rendered prompt with control tokens as text, without the token that llama.cpp adds to every text."""
    prompt_tokens: list[int]
    """All tokens that the model reads."""
    tokens: list[int]
    """The requested number of tokens, or fewer if the answer ended."""
    text: str
    margin: float
    """Smallest distance in nats between the likeliest token and the next. Another machine agrees if its rounding is
    smaller. 4-bit and 8-bit kernels differ by a tenth."""


def greedy_check(model: Path, context: int = CONTEXT, count: int = CHECKED_TOKENS) -> GreedyCheck:
    """Run the file `model` on one thread for `count` tokens, and return the question with the widest margin.

    The file must support `context` tokens.
    """
    options = EngineOptions(threads=1, context=min(context, CONTEXT), tune=False)  # the same answer on every machine
    with contextlib.closing(load_engine(model, options)) as engine:
        questions = TEXTS if engine.chat_template is None else QUESTIONS
        checks = [_answered(engine, question, count) for question in questions]
        return max(checks, key=lambda check: ("\N{REPLACEMENT CHARACTER}" not in check.text, check.margin))


def _answered(engine: EngineScheduler, question: str, count: int) -> GreedyCheck:
    if engine.chat_template is None:
        prompt, tokens = question, text_prompt(engine, question)
    else:
        messages = [{"role": "user", "content": question}]
        prompt = render_chat(engine.chat_template, messages, engine.bos_token, engine.eos_token)
        tokens = chat_prompt(engine, messages)
    if engine.adds_bos:
        prompt = prompt.removeprefix(engine.bos_token)
    generation = Generation(engine, tokens, AnswerOptions(count, top_logprobs=2))
    text = generation.whole()
    nearest = (each.top[0][1] - each.top[1][1] for each in generation.pop_logprobs())
    return GreedyCheck(question, prompt, tokens, generation.answer, text, min(nearest, default=0.0))
