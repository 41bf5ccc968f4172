"""Perplexity of a text: token count, nats per token, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...runtime.base.errors import DataError
from ..data.documents import DataSpec, is_held_out, open_documents
from .request_cache import Advance, RequestCache, no_progress
from .scoring import Request, ScoredModel

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
    stderr: float
    """Standard error of the perplexity over windows (delta method)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_wikitext(path: Path) -> str:
    """The raw test file as the string everybody measures on: rows joined by a blank line, empty rows empty."""
    rows = path.read_text(encoding="utf-8").split("\n")
    return "\n\n".join("" if not row.strip() else f"{row}\n" for row in rows)


def corpus_tokens(model: ScoredModel, path: str, limit: int) -> list[int]:
    """Ids of a corpus, documents separated by the end-of-text token, at most `limit` + 1 (0: all).

    Of the demo corpus only the documents that training never sees.
    """
    ids: list[int] = []
    for text in open_documents(DataSpec(path)):
        if path == "demo" and not is_held_out(text, HELD_OUT_FRACTION):
            continue
        ids += [*model.tokenize(text), model.separator]
        if limit and len(ids) > limit:
            return ids[: limit + 1]
    return ids


def measure(
    model: ScoredModel, tokens: Sequence[int], window: int, cache: RequestCache, advance: Advance = no_progress
) -> Perplexity:
    """Perplexity over consecutive windows; every token but the first is predicted once, from its window's start.

    DataError where there are fewer than two tokens.
    """
    window = min(window, model.context_length)
    if len(tokens) < 2:
        raise DataError("the text has fewer than two tokens; give a longer one")
    requests = [Request(tuple(tokens[at : at + window + 1]), 1) for at in range(0, len(tokens) - 1, window)]
    losses = [-log_prob for log_prob, _ in cache.answers(model, requests, advance)]
    count = len(tokens) - 1
    mean = sum(losses) / count
    # each window's loss around its share of the mean: the ratio estimator's variance
    deviations = [loss - mean * (len(r.tokens) - 1) for loss, r in zip(losses, requests, strict=True)]
    spread = math.sqrt(sum(d * d for d in deviations) * len(requests) / max(1, len(requests) - 1)) / count
    value = math.exp(mean) if mean < 700 else math.inf
    num_bytes = model.num_bytes(tokens[1:])
    return Perplexity(value, mean * count / math.log(2) / max(1, num_bytes), count, window, value * spread)
