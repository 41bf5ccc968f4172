"""Chats that a model holds with itself: questions and answers from its own template, to distil from without a corpus.

An open user turn makes the model ask, the assistant's turn makes it answer. Most are sampled from the model's own
distribution (temperature 1), which is what the KL divergence of distillation is an expectation over. Left alone a small
model asks for advice on careers and answers at length, beyond where anybody would sample it from, and what is cut
teaches nothing about how a turn ends. So a quarter is sampled as people chat, half of that with a first word that asks
for a fact, and every second batch asks for a short answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ...runtime.base.errors import UsageError
from ...runtime.base.files import write_text_atomically
from ...runtime.base.user_cache import cache_folder
from ..model.continuation import Warmth, continuations
from ..model.source import content_key
from .chat import Chat, ChatFormat

SELF_CHAT = "self-chat"
"""The --data that this is."""
LARGEST, SMALLEST = 200_000, 60
"""Tokens sampled at most; sequences at least, so that there are some to train on and some to hold out."""
QUESTION_TOKENS, ANSWER_TOKENS = 64, 160
"""Longest turns; a longer question is left out, a longer answer is cut and its end not learned."""
BRIEFLY = " Answer in one short sentence."
"""What every second batch of questions ends with."""
RECIPE = 2
"""Of what is below, for names of files: chats of another one are sampled anew."""
MAX_ROUNDS_WITHOUT = 3
"""Batches in a row that may give no whole chat before the model is said not to chat."""
MARK = "(what the user says)"
"""Stands in a rendered template for the user's words."""


@dataclass(frozen=True)
class Manner:
    """How a chat is sampled."""

    question: Warmth
    answer: Warmth
    opening: str = ""
    """What the question begins with."""


OPENINGS = ("What", "Who", "Which", "When", "Where", "How", "Why", "Name")
FREE, COOL = Manner(Warmth(), Warmth()), Manner(Warmth(0.8, min_p=0.05), Warmth(0.4, min_p=0.05))
MANNERS = tuple(
    manner
    for opening in OPENINGS + ("",) * len(OPENINGS)
    for manner in (FREE, FREE, FREE, replace(COOL, opening=opening))
)
"""Of the chats that are sampled side by side."""


def sample_chats(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    seed: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Chat]:
    """Chats of one question and one answer, until they hold about `tokens` tokens; a function of model and seed.

    UsageError where the model has no chat template or never ends a turn.
    """
    chat = ChatFormat.of_tokenizer(tokenizer)
    if chat is None:
        raise UsageError("--data self-chat: the source has no chat template")
    before, after = chat.prompt([{"role": "user", "content": MARK}]).split(MARK)
    turns = Turns(model, tokenizer, chat.end_of_turn)
    done = rounds_without = batch = 0
    known = set[str]()
    while done < tokens:
        prompts = [before + manner.opening for manner in MANNERS]
        said = turns.sample(prompts, QUESTION_TOKENS, [manner.question for manner in MANNERS], [seed, batch, 0])
        asked = {
            (manner.opening + turn.text).strip(): manner
            for manner, turn in zip(MANNERS, said, strict=True)
            if turn.is_whole
        }
        new = {question: manner for question, manner in asked.items() if question and question not in known}
        known.update(new)
        questions = [question + (BRIEFLY if batch % 2 else "") for question in new]
        prompts = [before + question + after for question in questions]
        answers = turns.sample(prompts, ANSWER_TOKENS, [manner.answer for manner in new.values()], [seed, batch, 1])
        chats = 0
        for question, answer in zip(questions, answers, strict=True):
            if text := answer.text.strip():
                yield Chat((("user", question), ("assistant", text)), is_cut=not answer.is_whole)
                done += len(tokenizer.encode(question + text, add_special_tokens=False))
                chats += 1
        batch += 1
        rounds_without = 0 if chats else rounds_without + 1
        if rounds_without == MAX_ROUNDS_WITHOUT:
            raise UsageError(
                "--data self-chat: the source ends no new question of its own, so it has no chats to learn from"
            )
        report(min(done, tokens), tokens)


def self_chat_file(
    source: Any,
    speaker: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    seed: int,
    report: Callable[[int, int], None],
) -> Path:
    """A .jsonl of `sample_chats`, sampled once for each source, length and seed and kept in the user's cache.

    `speaker` makes what is sampled from, the source in eval mode and the type of matrix products, only where it is.
    """
    path = cache_folder() / "self-chat" / f"{content_key(source)}-{RECIPE}-{tokens}-{seed}.jsonl"
    if not path.is_file():
        lines = [chat.to_json() + "\n" for chat in sample_chats(speaker(), tokenizer, tokens, seed, report)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, "".join(lines))
    return path


@dataclass(frozen=True)
class Turn:
    """What a model says after a prompt."""

    text: str
    is_whole: bool
    """Whether it ends: what is not whole was cut."""


class Turns:
    """What a model says after prompts."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, end_of_turn: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.end = tokenizer.encode(end_of_turn, add_special_tokens=False)[0]

    def sample(
        self, prompts: Sequence[str], max_tokens: int, warmths: Sequence[Warmth], seed: Sequence[int]
    ) -> list[Turn]:
        """A turn after each prompt, cut where it does not end within `max_tokens`."""
        if not prompts:
            return []
        ids = [self.tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
        settings = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=self.end,
            pad_token_id=self.end,
        )
        with torch.random.fork_rng():
            torch.manual_seed(hash(tuple(seed)) % 2**63)  # of integers: the same in every process
            found = continuations(self.model, ids, settings, self.model.device, warmths)
        turns: list[Turn] = []
        for row in found:
            is_whole = self.end in row
            text = self.tokenizer.decode(row[: row.index(self.end)] if is_whole else row, skip_special_tokens=True)
            turns.append(Turn(str(text), is_whole))
        return turns
