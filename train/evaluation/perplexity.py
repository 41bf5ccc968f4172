"""Perplexity and bits per byte of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...runtime.base.errors import DataError
from ..data.documents import DataSpec, is_held_out, open_texts
from .scoring import Advance, EvaluatedModel, ScoreCache, ScoreRequest

WIKITEXT = "wikitext2"
WIKITEXT_FILE = "wikitext2_raw_test.txt"
HELD_OUT_FRACTION = 0.05


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on a text."""

    perplexity: float
    bits_per_byte: float
    """Comparable between tokenizers, unlike perplexity."""
    tokens: int
    """Tokens predicted."""
    window: int
    documents: int
    stderr: float
    """Standard error of the perplexity over documents, or over the windows of a single document (delta method). NaN
    for a single window."""
    min_context: int = 1
    """Fewest tokens before a predicted token in its window."""

    @property
    def behind(self) -> str:
        """Return text such as `behind 256 others` to follow a number of tokens, or "" if all tokens count."""
        return f" behind {self.min_context} others" if self.min_context > 1 else ""


def read_wikitext(path: Path) -> str:
    """Return the raw test file in its usual form: rows joined by a blank line, with blank rows empty."""
    rows = path.read_text(encoding="utf-8").split("\n")
    return "\n\n".join("" if not row.strip() else f"{row}\n" for row in rows)


def corpus_documents(
    model: EvaluatedModel, path: str, document_tokens: int, limit: int, min_context: int = 1
) -> list[list[int]]:
    """Return token ids of a corpus' documents until `limit` tokens are to be predicted (0: all).

    Each document is cut after `document_tokens` + 1 tokens (0: no cut). Its first `min_context` tokens are not
    predicted, so documents of no more tokens are skipped. Only the held-out part of the demo corpus is used. Raises
    DataError if no document remains.
    """
    documents: list[list[int]] = []
    predicted = 0
    for text in open_texts(DataSpec(path, flag="--text")):
        if path == "demo" and not is_held_out(text, HELD_OUT_FRACTION):
            continue
        ids = model.tokenize(text)
        ids = ids[: document_tokens + 1] if document_tokens else ids
        ids = ids[: min_context + limit - predicted] if limit else ids
        if len(ids) <= min_context:
            continue
        documents.append(ids)
        predicted += len(ids) - min_context
        if predicted == limit:
            break
    if not documents:
        raise DataError(f"{path}: no document has more than {min_context} tokens; give longer ones")
    return documents


def measure_perplexity(
    model: EvaluatedModel,
    documents: Sequence[Sequence[int]],
    window: int,
    cache: ScoreCache,
    advance: Advance = lambda done, total: None,
    min_context: int = 1,
) -> Perplexity:
    """Return the perplexity over all tokens of the documents but the first `min_context` of each.

    Every token is predicted once, from the start of its window and at least `min_context` tokens. Windows overlap by
    as many. Raises DataError if there is nothing to predict.
    """
    window = min(window, model.context_length)
    if min_context > window:
        raise DataError(f"--min-context {min_context} exceeds the context of {window} tokens; give a smaller one")
    documents = [tokens for tokens in documents if len(tokens) > min_context]
    requests: list[ScoreRequest] = []
    owners: list[int] = []
    for owner, tokens in enumerate(documents):
        # the tokens of a window overlap with the last one's by those that only give context
        starts = range(0, len(tokens) - min_context, window - min_context + 1)
        requests += [ScoreRequest(tuple(tokens[at : at + window + 1]), min_context) for at in starts]
        owners += [owner] * len(starts)
    if not requests:
        raise DataError(f"no document of the text has more than {min_context} tokens; give longer ones")
    losses = [-log_prob for log_prob, _ in cache.totals(model, requests, advance)]
    counts = [len(request.tokens) - request.first for request in requests]
    count = sum(counts)
    mean = sum(losses) / count
    # variance of a ratio estimator: deviation of each unit's loss from its share of the mean
    units = owners if len(documents) > 1 else list(range(len(requests)))
    deviations = np.bincount(units, np.asarray(losses) - mean * np.asarray(counts))
    size, spread = len(deviations), math.nan
    if size > 1:
        variance = float(deviations @ deviations) * size / (size - 1)
        spread = math.sqrt(variance) / count
    value = math.exp(mean) if mean < 700 else math.inf  # exp of more overflows
    num_bytes = sum(model.num_bytes(tokens[min_context:]) for tokens in documents)
    bits = mean * count / math.log(2) / max(1, num_bytes)
    return Perplexity(value, bits, count, window, len(documents), value * spread, min_context)
