"""Chats that a model samples from itself, to distil from without a corpus.

An open user turn of the chat template makes the model write a question, and the assistant's turn makes it answer. Most
are sampled at temperature 1, which is the distribution that the KL divergence of distillation averages over. Sampled
only in this way, a small model mostly asks for advice on careers and answers at length. Answers that are cut teach
nothing about the end of a turn. Therefore a quarter of the chats is sampled at lower temperatures, half of these with a
first word that asks for a fact, and every second batch asks for a short answer.
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
from ..model.continuation import RowSampling, continuations
from ..model.source import content_key
from .chat import Chat, ChatFormat

MAX_TOKENS = 200_000
"""Most tokens to sample."""
MIN_SEQUENCES = 60
"""Fewest sequences to sample, so that there are some to train on and some to hold out."""
QUESTION_TOKENS, ANSWER_TOKENS = 64, 160
"""Longest turns. A longer question is discarded. A longer answer is cut, and its end is not learned."""
SHORT_ANSWER_REQUEST = " Answer in one short sentence."
"""Text after the questions of every second batch."""
CACHE_VERSION = 2
"""Version of the sampling below, in names of cached files. Chats of another version are sampled again."""
MAX_EMPTY_BATCHES = 3
"""Batches in a row without a chat after which sampling fails."""
PLACEHOLDER = "(what the user says)"
"""Stands for the user's words in a rendered template."""


@dataclass(frozen=True)
class ChatStyle:
    """Sampling settings of one chat."""

    question: RowSampling
    answer: RowSampling
    opening: str = ""
    """First word of the question."""


OPENINGS = ("What", "Who", "Which", "When", "Where", "How", "Why", "Name")
PLAIN = ChatStyle(RowSampling(), RowSampling())
LOW_TEMPERATURE = ChatStyle(RowSampling(0.8, min_p=0.05), RowSampling(0.4, min_p=0.05))
STYLES = tuple(
    style
    for opening in OPENINGS + ("",) * len(OPENINGS)
    for style in (PLAIN, PLAIN, PLAIN, replace(LOW_TEMPERATURE, opening=opening))
)
"""Styles of the chats of one batch."""


def sample_chats(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    seed: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Chat]:
    """Yield chats of one question and one answer until they hold about `tokens` tokens.

    They depend on the model and the seed alone, and no question is repeated. Raises UsageError if the model has no chat
    template or never ends a turn.
    """
    chat_format = ChatFormat.of_tokenizer(tokenizer)
    if chat_format is None:
        raise UsageError("--data self-chat: the source has no chat template")
    before, after = chat_format.prompt([{"role": "user", "content": PLACEHOLDER}]).split(PLACEHOLDER)
    sampler = TurnSampler(model, tokenizer, chat_format.end_of_turn)
    done = num_empty_batches = batch = 0
    known = set[str]()
    while done < tokens:
        prompts = [before + style.opening for style in STYLES]
        turns = sampler.sample(prompts, QUESTION_TOKENS, [style.question for style in STYLES], [seed, batch, 0])
        styles: dict[str, ChatStyle] = {}
        for style, (text, is_whole) in zip(STYLES, turns, strict=True):
            question = (style.opening + text).strip()
            # a question that was cut has no answer that fits; a cut answer still teaches its tokens
            if is_whole and question and question not in known:
                styles[question] = style
        known.update(styles)
        request = SHORT_ANSWER_REQUEST if batch % 2 else ""
        questions = [question + request for question in styles]
        prompts = [before + question + after for question in questions]
        samplings = [style.answer for style in styles.values()]
        answers = sampler.sample(prompts, ANSWER_TOKENS, samplings, [seed, batch, 1])
        num_chats = 0
        for question, (text, is_whole) in zip(questions, answers, strict=True):
            if answer := text.strip():
                yield Chat.of(("user", question), ("assistant", answer), is_cut=not is_whole)
                done += len(tokenizer.encode(question + answer, add_special_tokens=False))
                num_chats += 1
        batch += 1
        # a model that repeats itself, or ends no turn, would otherwise be sampled without end
        num_empty_batches = 0 if num_chats else num_empty_batches + 1
        if num_empty_batches == MAX_EMPTY_BATCHES:
            raise UsageError(
                "--data self-chat: the source ends no new question of its own, so it has no chats to learn from; "
                "give another --data"
            )
        report(min(done, tokens), tokens)


def self_chat_file(
    source: Any,
    load_model: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    seed: int,
    report: Callable[[int, int], None],
) -> Path:
    """Return a .jsonl of `sample_chats`, kept in the user's cache for each source, length and seed.

    `load_model` is called on a cache miss and returns the model that samples.
    """
    path = cache_folder() / "self-chat" / f"{content_key(source)}-{CACHE_VERSION}-{tokens}-{seed}.jsonl"
    if not path.is_file():
        lines = [chat.to_json() + "\n" for chat in sample_chats(load_model(), tokenizer, tokens, seed, report)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, "".join(lines))
    return path


class TurnSampler:
    """Samples the turns that a model generates after prompts."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, end_of_turn: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.end = tokenizer.encode(end_of_turn, add_special_tokens=False)[0]

    def sample(
        self, prompts: Sequence[str], max_tokens: int, samplings: Sequence[RowSampling], seed: Sequence[int]
    ) -> list[tuple[str, bool]]:
        """Return the text after each prompt, and whether the model ended its turn within `max_tokens`."""
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
        with torch.random.fork_rng():  # the run's own random numbers stay as without sampling
            torch.manual_seed(hash(tuple(seed)) % 2**63)  # hashes of integers are the same in every process
            rows = continuations(self.model, ids, settings, self.model.device, samplings)
        turns: list[tuple[str, bool]] = []
        for row in rows:
            is_whole = self.end in row
            text = self.tokenizer.decode(row[: row.index(self.end)] if is_whole else row, skip_special_tokens=True)
            turns.append((str(text), is_whole))
        return turns
