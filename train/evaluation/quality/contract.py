"""Measure a model's quality and compare it with its source's.

Quality is perplexity on six kinds of text, the likelihood of chat answers and of the end of a turn, and answers to
questions of fact. The quality contract gives each figure beside the source's, as a ratio with its standard error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ....runtime.base.errors import DataError
from ....runtime.engines.contract_text import ALL_TEXTS
from ...data.chat import ChatFormat
from ..scoring import EvaluatedModel, ScoreRequest, mean_and_error
from .sets import chats, facts, texts

DOCUMENT_TOKENS = 256
"""First tokens of each document to predict."""
CHAT_ANSWERS = "chat answers"
"""Name of the chat answers among kinds of text."""
ANSWER_TOKENS = 32
"""Longest answer to a question of fact. Only its first sentence counts."""

Report = Callable[[str, int, int], None]
"""report(name of the measurement, done, total)."""


@dataclass(frozen=True)
class Quality:
    """Figures of each document, chat and question, so that two models can be compared pair by pair."""

    texts: dict[str, list[float]]
    """{kind of text: nats per token of each document}"""
    chat_answers: list[float]
    """Nats per token of each reference answer under the model's chat template. Empty without a template."""
    turn_ends: list[float]
    """Nats of the token that ends the turn after each of these answers."""
    answers: list[str]
    """Greedy answers to the questions of fact."""
    bytes_per_token: dict[str, list[float]]
    """Bytes per token of each document of `texts`, and under CHAT_ANSWERS of each reference answer. They compare models
    with different tokens."""
    vocab_size: int
    """Vocabulary size of the model."""

    def in_tokens_of(self, other: Quality) -> Quality:
        """Return this quality in nats per token of another model's tokens, which are of other sizes in bytes.

        It is unchanged if both models have equally many tokens.
        """
        if self.vocab_size == other.vocab_size:
            return self
        return replace(
            self,
            texts={kind: self._scaled(nats, kind, other) for kind, nats in self.texts.items()},
            chat_answers=self._scaled(self.chat_answers, CHAT_ANSWERS, other),
            bytes_per_token=other.bytes_per_token,
        )

    def _scaled(self, nats: Sequence[float], name: str, other: Quality) -> list[float]:
        sizes, other_sizes = self.bytes_per_token.get(name, []), other.bytes_per_token.get(name, [])
        return [value * wanted / size for value, size, wanted in zip(nats, sizes, other_sizes, strict=False)]

    @property
    def bits_per_byte(self) -> float:
        """Return the mean over the kinds of text, equally weighted."""
        means = []
        for kind, nats in self.texts.items():
            sizes = self.bytes_per_token[kind]
            bits = [value / size / math.log(2) for value, size in zip(nats, sizes, strict=True)]
            means.append(statistics.fmean(bits))
        return statistics.fmean(means)

    @property
    def nats(self) -> float:
        """Return the mean nats per token over the kinds of text, equally weighted."""
        return statistics.fmean(statistics.fmean(values) for values in self.texts.values())

    @property
    def right(self) -> list[bool]:
        """Return for each question of fact whether it was answered right."""
        return [fact.is_right(answer) for fact, answer in zip(facts(), self.answers, strict=False)]


def measure_quality(model: EvaluatedModel, report: Report = lambda name, done, total: None) -> Quality:
    """Measure a model on all sets, or on the texts alone if it has no chat template.

    This scores about 25,000 tokens of a tokenizer with 49,000 words, and generates a hundred short answers. Raises
    DataError if the model's context is too short.
    """
    chat_format = ChatFormat.of(model.chat_template, model.bos_token, model.eos_token)
    kinds, requests = _text_requests(model)
    num_texts = len(requests)
    prompts: list[list[int]] = []
    if chat_format is not None:
        requests += _chat_requests(model, chat_format)
        prompts = [_prompt(model, chat_format, fact.question) for fact in facts()]
    losses = _losses(model, requests, report)
    answers: list[str] = []
    for answer in model.answer(prompts, ANSWER_TOKENS):
        answers.append(answer)
        report("questions", len(answers), len(prompts))
    sizes = []
    for each in requests:
        scored = each.tokens[each.first :]
        sizes.append(model.num_bytes(scored) / len(scored))
    bytes_per_token = _by_kind(kinds, sizes)
    chat_losses = losses[num_texts:]
    if chat_losses:  # the end of the turn has no bytes, and is no part of the answer
        pairs = zip(sizes[num_texts:], chat_losses, strict=True)
        bytes_per_token[CHAT_ANSWERS] = [size * len(nats) / (len(nats) - 1) for size, nats in pairs]
    return Quality(
        texts=_by_kind(kinds, [sum(nats) / len(nats) for nats in losses[:num_texts]]),
        chat_answers=[sum(nats[:-1]) / len(nats[:-1]) for nats in chat_losses],
        turn_ends=[nats[-1] for nats in chat_losses],
        answers=answers,
        bytes_per_token=bytes_per_token,
        vocab_size=model.vocab_size,
    )


def _text_requests(model: EvaluatedModel) -> tuple[list[str], list[ScoreRequest]]:
    """Return the kind of each document and a request for it."""
    kinds: list[str] = []
    requests: list[ScoreRequest] = []
    length = min(DOCUMENT_TOKENS, model.context_length - 1)
    for kind, documents in texts().items():
        for text in documents:
            kinds.append(kind)
            requests.append(ScoreRequest(tuple(model.tokenize(text)[: length + 1]), 1))
    return kinds, requests


def _chat_requests(model: EvaluatedModel, chat_format: ChatFormat) -> list[ScoreRequest]:
    """Return a request for each reference answer and the token that ends its turn."""
    end = model.encode_markup(chat_format.end_of_turn)[:1]
    requests: list[ScoreRequest] = []
    for chat in chats():
        prompt = _prompt(model, chat_format, chat.question)
        requests.append(ScoreRequest((*prompt, *model.encode_markup(chat.answer), *end), len(prompt)))
    return requests


def _prompt(model: EvaluatedModel, chat_format: ChatFormat, question: str) -> list[int]:
    return model.encode_markup(chat_format.prompt([{"role": "user", "content": question}]))


def _by_kind(kinds: Sequence[str], values: Sequence[float]) -> dict[str, list[float]]:
    """Group the values of documents by kind of text. Further values, of chats, are ignored."""
    found: dict[str, list[float]] = {}
    for kind, value in zip(kinds, values, strict=False):
        found.setdefault(kind, []).append(value)
    return found


def _losses(model: EvaluatedModel, requests: Sequence[ScoreRequest], report: Report) -> list[list[float]]:
    """Return the nats of every scored token of every request."""
    longest = max(len(request.tokens) for request in requests)
    if longest > model.context_length + 1:
        raise DataError(f"a context of {model.context_length} tokens is too short to measure quality: {longest} needed")
    losses: list[list[float]] = [[]] * len(requests)
    for done, (index, score) in enumerate(model.score(requests), 1):
        losses[index] = (-score.log_probs).tolist()
        report("quality", done, len(requests))
    return losses


def contract(quality: Quality, reference: Quality, reference_name: str) -> dict[str, Any]:
    """Return the quality contract of `quality` relative to `reference`, as JSON values.

    Perplexities are exp(mean over documents of the mean nats per token). Errors are those of differences paired by
    document. A model with other tokens is compared by its nats for the bytes of one of the reference's tokens.
    """
    has_other_tokens = quality.vocab_size != reference.vocab_size
    bits = {"bits_per_byte": quality.bits_per_byte, "reference": reference.bits_per_byte}
    quality = quality.in_tokens_of(reference)
    kinds = {kind: _paired(quality.texts[kind], reference.texts[kind]) for kind in quality.texts}
    # the relative error of a ratio is the error of its difference in nats
    errors = [each["ratio_stderr"] / each["ratio"] for each in kinds.values()]
    nats, reference_nats = quality.nats, reference.nats
    # of the mean of independent kinds
    error = math.sqrt(sum(each * each for each in errors)) / len(errors)
    found: dict[str, Any] = {
        "reference": reference_name,
        "texts": {**kinds, ALL_TEXTS: _ratio(nats, reference_nats, nats - reference_nats, error)},
    }
    if has_other_tokens and all(map(math.isfinite, bits.values())):
        found["bits_per_byte"] = bits
    if quality.chat_answers and reference.chat_answers:
        found["chat_answers"] = _paired(quality.chat_answers, reference.chat_answers)
        ends = zip(quality.turn_ends, reference.turn_ends, strict=True)
        difference, error = mean_and_error([end - reference_end for end, reference_end in ends])
        found["end_of_turn"] = {
            "nats": statistics.fmean(quality.turn_ends),
            "reference": statistics.fmean(reference.turn_ends),
            "difference": difference,
            "difference_stderr": error,
        }
    if quality.answers and reference.answers:
        right, expected = quality.right, reference.right
        num_kept = sum(is_right and was_right for is_right, was_right in zip(right, expected, strict=True))
        found["questions"] = {"asked": len(right), "reference": sum(expected), "right": sum(right), "kept": num_kept}
    return found


def _paired(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Return the perplexities of nats per document, and their ratio with the error of the paired differences."""
    difference, error = mean_and_error([one - other for one, other in zip(values, reference, strict=True)])
    return _ratio(statistics.fmean(values), statistics.fmean(reference), difference, error)


def _ratio(nats: float, reference: float, difference: float, error: float) -> dict[str, float]:
    ratio = math.exp(difference)
    return {
        "perplexity": math.exp(nats),
        "reference": math.exp(reference),
        "ratio": ratio,
        "ratio_stderr": ratio * error,
    }
