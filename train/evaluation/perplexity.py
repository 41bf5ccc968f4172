"""Perplexity of a text: token count, nats per token, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.base.errors import DataError
from ..data.documents import DataSpec, is_held_out, open_texts
from .harness import Advance, RequestCache, no_progress
from .scoring import Request, ScoredModel

WIKITEXT = "wikitext2"
WIKITEXT_FILE = "wikitext2_raw_test.txt"
HELD_OUT_FRACTION = 0.05


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text."""

    perplexity: float
    bits_per_byte: float
    """Comparable between tokenizers, which perplexity is not."""
    tokens: int
    """Tokens predicted."""
    window: int
    documents: int
    stderr: float
    """Standard error of the perplexity over documents, or over the windows of a single one (delta method); NaN where
    there is only one of them."""
    min_context: int = 1
    """Tokens at least that stand before a predicted one in its window."""

    @property
    def behind(self) -> str:
        """`behind 256 others`, to follow a number of tokens; "" where all count."""
        return f" behind {self.min_context} others" if self.min_context > 1 else ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_wikitext(path: Path) -> str:
    """The raw test file as the string everybody measures on: rows joined by a blank line, empty rows empty."""
    rows = path.read_text(encoding="utf-8").split("\n")
    return "\n\n".join("" if not row.strip() else f"{row}\n" for row in rows)


def corpus_documents(
    model: ScoredModel, path: str, document_tokens: int, limit: int, min_context: int = 1
) -> list[list[int]]:
    """Ids of a corpus' documents: `document_tokens` + 1 of each (0: all), until `limit` are predicted (0: all).

    The first `min_context` of a document are not predicted, so documents without more are left out. Of the demo corpus
    only the documents that training never sees. DataError where nothing is left.
    """
    documents: list[list[int]] = []
    predicted = 0
    for text in open_texts(DataSpec(path)):
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


def measure(
    model: ScoredModel,
    documents: Sequence[Sequence[int]],
    window: int,
    cache: RequestCache,
    advance: Advance = no_progress,
    min_context: int = 1,
) -> Perplexity:
    """Perplexity over the documents' windows; every token of a document but its first `min_context` is predicted once,
    from its window's start, where as many stand before it. DataError where there is nothing to predict.
    """
    window = min(window, model.context_length)
    if min_context > window:
        raise DataError(f"--min-context {min_context}: the context is of {window} tokens; give fewer")
    documents = [tokens for tokens in documents if len(tokens) > min_context]
    requests: list[Request] = []
    owners: list[int] = []
    for owner, tokens in enumerate(documents):
        starts = range(0, len(tokens) - min_context, window - min_context + 1)
        requests += [Request(tuple(tokens[at : at + window + 1]), min_context) for at in starts]
        owners += [owner] * len(starts)
    if not requests:
        raise DataError(f"no document of the text has more than {min_context} tokens; give longer ones")
    losses = [-log_prob for log_prob, _ in cache.answers(model, requests, advance)]
    counts = [len(request.tokens) - request.first for request in requests]
    count = sum(counts)
    mean = sum(losses) / count
    # each unit's loss around its share of the mean: the ratio estimator's variance
    units = owners if len(documents) > 1 else list(range(len(requests)))
    deviations = np.bincount(units, np.asarray(losses) - mean * np.asarray(counts))
    size = len(deviations)
    spread = math.sqrt(float(deviations @ deviations) * size / (size - 1)) / count if size > 1 else math.nan
    value = math.exp(mean) if mean < 700 else math.inf
    num_bytes = sum(model.num_bytes(tokens[min_context:]) for tokens in documents)
    bits = mean * count / math.log(2) / max(1, num_bytes)
    return Perplexity(value, bits, count, window, len(documents), value * spread, min_context)
