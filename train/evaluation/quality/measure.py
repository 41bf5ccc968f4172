"""Perplexity on six kinds of text, the likelihood of chat answers and of the end of a turn, and questions of fact.

The quality contract: every figure of a model beside its source's, as a ratio with its error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ....runtime.base.errors import DataError
from ....runtime.engines.contract_text import ALL_TEXTS
from ...data.chat import ChatFormat
from ..scoring import Request, ScoredModel
from .sets import chats, facts, texts

DOCUMENT_TOKENS = 256
"""Of each document, its first."""
CHAT_ANSWERS = "chat answers"
"""Their name among kinds of text."""
ANSWER_TOKENS = 32
"""Of each question of fact; a right answer comes in its first sentence."""

Report = Callable[[str, int, int], None]
"""report(what is measured, done, total)."""


def silent(what: str, done: int, total: int) -> None:
    """A Report that shows nothing."""


@dataclass(frozen=True)
class Quality:
    """What a model made of each document, chat and question, so that two models can be compared pair by pair."""

    texts: dict[str, list[float]]
    """{kind: nats per token of each document}"""
    chat_answers: list[float]
    """Nats per token of each reference answer under the model's own chat template; empty without one."""
    turn_ends: list[float]
    """Nats of the token that ends the turn after each of these answers."""
    answers: list[str]
    """Greedy answers to the questions of fact."""
    bytes_per_token: dict[str, list[float]] = field(default_factory=dict)
    """Of each document of `texts`, and under CHAT_ANSWERS of each reference answer: what models of other tokens compare
    by. Empty in what earlier releases wrote."""
    vocab_size: int = 0
    """Of the model; 0 in what earlier releases wrote."""

    def in_tokens_of(self, other: Quality) -> Quality:
        """The same with nats per token of another model's tokens: of as many bytes of text as those have there. Nothing
        changes where both have as many tokens."""
        if self.vocab_size == other.vocab_size or not self.bytes_per_token or not other.bytes_per_token:
            return self
        return replace(
            self,
            texts={kind: self._scaled(nats, kind, other) for kind, nats in self.texts.items()},
            chat_answers=self._scaled(self.chat_answers, CHAT_ANSWERS, other),
            bytes_per_token=other.bytes_per_token,
        )

    def _scaled(self, nats: Sequence[float], name: str, other: Quality) -> list[float]:
        ours, theirs = (each.bytes_per_token.get(name, []) for each in (self, other))
        return [value * wanted / size for value, size, wanted in zip(nats, ours, theirs, strict=False)]

    @property
    def bits_per_byte(self) -> float:
        """Over all kinds of text, each with the same weight; NaN in what earlier releases wrote."""
        if not self.bytes_per_token:
            return math.nan
        bits = {
            kind: [value / size / math.log(2) for value, size in zip(nats, self.bytes_per_token[kind], strict=True)]
            for kind, nats in self.texts.items()
        }
        return statistics.fmean(statistics.fmean(values) for values in bits.values())

    @property
    def nats(self) -> float:
        """Per token, over all kinds of text, each with the same weight."""
        return statistics.fmean(statistics.fmean(values) for values in self.texts.values())

    @property
    def right(self) -> list[bool]:
        """Which of the questions of fact were answered right."""
        return [fact.is_right(answer) for fact, answer in zip(facts(), self.answers, strict=False)]

    def to_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Quality:
        return cls(**values)


def measure_quality(model: ScoredModel, report: Report = silent) -> Quality:
    """Measure a model; about 25,000 tokens of a 49,000-word tokenizer, and a hundred short answers where it chats."""
    chat = ChatFormat.of(model.chat_template, model.bos_token, model.eos_token)
    requests, places = _text_requests(model)
    num_texts = len(requests)
    prompts: list[list[int]] = []
    if chat is not None:
        end = model.encode_markup(chat.end_of_turn)[:1]
        for each in chats():
            prompt = model.encode_markup(chat.prompt([{"role": "user", "content": each.question}]))
            answer = [*model.encode_markup(each.answer), *end]
            requests.append(Request((*prompt, *answer), len(prompt)))
        prompts = [model.encode_markup(chat.prompt([{"role": "user", "content": fact.question}])) for fact in facts()]
    losses = _losses(model, requests, report)
    found: dict[str, list[float]] = {}
    for kind, nats in zip(places, losses, strict=False):
        found.setdefault(kind, []).append(sum(nats) / len(nats))
    sizes = [model.num_bytes(each.tokens[each.first :]) / (len(each.tokens) - each.first) for each in requests]
    bytes_per_token: dict[str, list[float]] = {}
    for kind, size in zip(places, sizes, strict=False):
        bytes_per_token.setdefault(kind, []).append(size)
    spoken = losses[num_texts:]
    answers: list[str] = []
    for answer in model.answer(prompts, ANSWER_TOKENS):
        answers.append(answer)
        report("questions", len(answers), len(prompts))
    means = [sum(nats[:-1]) / len(nats[:-1]) for nats in spoken]
    if spoken:  # the end of the turn has no bytes, and is no part of the answer
        pairs = zip(sizes[num_texts:], spoken, strict=True)
        bytes_per_token[CHAT_ANSWERS] = [size * len(nats) / (len(nats) - 1) for size, nats in pairs]
    return Quality(found, means, [nats[-1] for nats in spoken], answers, bytes_per_token, model.vocab_size)


def _text_requests(model: ScoredModel) -> tuple[list[Request], list[str]]:
    """One request a document, and the kind of each."""
    requests: list[Request] = []
    kinds: list[str] = []
    length = min(DOCUMENT_TOKENS, model.context_length - 1)
    for kind, documents in texts().items():
        for text in documents:
            requests.append(Request(tuple(model.tokenize(text)[: length + 1]), 1))
            kinds.append(kind)
    return requests, kinds


def _losses(model: ScoredModel, requests: Sequence[Request], report: Report) -> list[list[float]]:
    """Nats of every scored token of every request."""
    longest = max(len(request.tokens) for request in requests)
    if longest > model.context_length + 1:
        raise DataError(f"a context of {model.context_length} tokens is too short to measure quality: {longest} needed")
    losses: list[list[float]] = [[]] * len(requests)
    for done, (index, score) in enumerate(model.score(requests), 1):
        losses[index] = (-score.log_probs).tolist()
        report("quality", done, len(requests))
    return losses


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def _paired(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Perplexities of nats per document, and their ratio; its error is that of the paired differences."""
    difference, error = _mean_and_error([one - other for one, other in zip(values, reference, strict=True)])
    return _ratio(statistics.fmean(values), statistics.fmean(reference), difference, error)


def _ratio(nats: float, reference: float, difference: float, error: float) -> dict[str, float]:
    ratio = math.exp(difference)
    return {
        "perplexity": math.exp(nats),
        "reference": math.exp(reference),
        "ratio": ratio,
        "ratio_stderr": ratio * error,
    }


def contract(quality: Quality, reference: Quality, reference_name: str) -> dict[str, Any]:
    """What `quality` is in shares of `reference`, JSON values.

    Perplexities are exp(mean over documents of the mean nats per token); errors are over documents, paired. A model of
    other tokens is compared by what it needs for the bytes of one of the reference's.
    """
    has_other_tokens = quality.vocab_size != reference.vocab_size
    bits = {"bits_per_byte": quality.bits_per_byte, "reference": reference.bits_per_byte}
    quality = quality.in_tokens_of(reference)
    texts = {kind: _paired(quality.texts[kind], reference.texts[kind]) for kind in quality.texts}
    errors = [each["ratio_stderr"] / each["ratio"] for each in texts.values()]
    nats, base = quality.nats, reference.nats
    error = math.sqrt(sum(each * each for each in errors)) / len(errors)
    found: dict[str, Any] = {
        "reference": reference_name,
        "texts": {**texts, ALL_TEXTS: _ratio(nats, base, nats - base, error)},
    }
    if has_other_tokens and all(map(math.isfinite, bits.values())):
        found["bits_per_byte"] = bits
    if quality.chat_answers and reference.chat_answers:
        found["chat_answers"] = _paired(quality.chat_answers, reference.chat_answers)
        ends = zip(quality.turn_ends, reference.turn_ends, strict=True)
        difference, error = _mean_and_error([one - other for one, other in ends])
        found["end_of_turn"] = {
            "nats": statistics.fmean(quality.turn_ends),
            "reference": statistics.fmean(reference.turn_ends),
            "difference": difference,
            "difference_stderr": error,
        }
    if quality.answers and reference.answers:
        right, expected = quality.right, reference.right
        found["questions"] = {
            "asked": len(right),
            "reference": sum(expected),
            "right": sum(right),
            "kept": sum(one and other for one, other in zip(right, expected, strict=True)),
        }
    return found
