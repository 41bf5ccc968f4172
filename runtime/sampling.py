"""Choosing the next token from logits; the same for every engine. V is the vocabulary size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .base import flags


@dataclass(frozen=True)
class SamplingOptions:
    """sampling"""

    temperature: float = 0.0
    """0: always the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens already in the sequence by this (arXiv 1909.05858); 1: off."""
    seed: int | None = None
    """Makes sampling repeatable."""

    def __post_init__(self) -> None:
        flags.check_types(self)
        for name, holds, rule in (
            ("temperature", 0 <= self.temperature < float("inf"), "must be a number of at least 0"),
            ("top_k", self.top_k >= 0, "must not be negative"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "must be between 0 and 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "must be between 0.01 and 100"),
        ):
            flags.require(self, name, holds, rule)


class Sampler:
    """Draws tokens as its options say."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self.random = np.random.default_rng(options.seed)

    def sample(self, logits: np.ndarray, context: Sequence[int]) -> int:
        """Next token from fp32 logits [V], given the tokens before it."""
        options = self.options
        if options.repetition_penalty != 1.0 and context:
            logits = penalize(logits, context, options.repetition_penalty)
        if options.temperature == 0.0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        if options.top_k:
            order = order[: options.top_k]
        chosen = logits[order].astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature leaves the most likely token alone
            probabilities = np.exp((chosen - chosen[0]) / options.temperature)
        probabilities /= probabilities.sum()
        keep = probabilities >= options.min_p * probabilities[0]
        # a token is kept while the mass before it is below top_p, so the most likely one always is
        keep &= np.cumsum(probabilities) - probabilities < options.top_p
        probabilities = probabilities[keep] / probabilities[keep].sum()
        return int(self.random.choice(order[keep], p=probabilities))


def penalize(logits: np.ndarray, context: Sequence[int], penalty: float) -> np.ndarray:
    """Logits with tokens of `context` made less likely: positive ones divided, negative ones multiplied."""
    seen = np.unique(np.asarray(context))
    penalized = logits.copy()
    values = penalized[seen]
    penalized[seen] = np.where(values > 0, values / penalty, values * penalty)
    return penalized


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities (nats) along the last axis, fp64: differences of nearly equal models survive in it."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
