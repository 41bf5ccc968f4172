"""How far a file is from the unquantised source, in the engine that runs both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from efficientllm.runtime.sampling import log_softmax
from efficientllm.train.evaluation.scoring import EngineModel

DOCUMENT_TOKENS = 256
"""Of each document, its first."""


@dataclass(frozen=True)
class Divergence:
    """Of one kind of text."""

    kl: list[float]
    """KL(source || file) of each document, nats per token."""
    nats: list[float]
    """What the file needs for each document, in all."""
    num_bytes: list[int]
    """UTF-8 bytes of the predicted tokens."""

    @property
    def bits_per_byte(self) -> float:
        return sum(self.nats) / math.log(2) / sum(self.num_bytes)

    def to_dict(self) -> dict[str, Any]:
        return vars(self).copy()


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over documents."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def divergences(source: EngineModel, model: EngineModel, texts: Mapping[str, Sequence[str]]) -> dict[str, Divergence]:
    """By kind of text; both have the same tokenizer."""
    found: dict[str, Divergence] = {}
    for kind, documents in texts.items():
        rows = [_document(source, model, text) for text in documents]
        kl, nats, sizes = (list(column) for column in zip(*rows, strict=True))
        found[kind] = Divergence(kl, nats, sizes)
    return found


def _document(source: EngineModel, model: EngineModel, text: str) -> tuple[float, float, int]:
    ids = source.tokenize(text)[: DOCUMENT_TOKENS + 1]
    following = np.asarray(ids[1:])
    kl, nats = 0.0, 0.0
    for place, (theirs, ours) in enumerate(zip(_rows(source, ids), _rows(model, ids), strict=True)):
        p, q = log_softmax(theirs), log_softmax(ours)
        kl += float((np.exp(p) * (p - q)).sum())
        nats -= float(q[following[place]])
    return kl / len(following), nats, source.num_bytes(ids[1:])


def _rows(model: EngineModel, ids: Sequence[int]) -> Iterator[np.ndarray]:
    """Logits [V] after every token but the last."""
    for rows in model.engine.evaluate(ids[:-1], 0):
        yield from rows
