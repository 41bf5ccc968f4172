"""The quality contract: every figure of a model beside its source's, as a ratio with its error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from ....runtime.engines.contract_text import ALL_TEXTS
from .measure import Quality


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
