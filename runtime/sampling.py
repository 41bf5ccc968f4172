"""Choose the next token from logits, alike for every engine. V is the vocabulary size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .base import flags
from .base.errors import ArtefactError, UnanswerableError

LLAMA_CPP_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.0}
"""Defaults of llama.cpp's programs, for options that a model's generation_config.json does not set."""

RANGES: Mapping[str, flags.Bounds] = {
    "temperature": {"at_least": 0, "at_most": 1e30},
    "top_k": {"at_least": 0},
    "top_p": {"above": 0, "at_most": 1},
    "min_p": {"at_least": 0, "at_most": 1},
    "repetition_penalty": {"at_least": 0.01, "at_most": 100},
    "frequency_penalty": {"at_least": -100, "at_most": 100},
    "presence_penalty": {"at_least": -100, "at_most": 100},
}
REQUEST_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_k": (0, 1_000_000),
    "top_p": (1e-30, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
}
"""Smallest and largest value in a request, within RANGES. Most are OpenAI's."""


def number(name: str, default: float | None) -> Any:
    """Return a dataclass field of a number within its range."""
    return flags.number(default, **RANGES[name])


@dataclass(frozen=True)
class SamplingDefaults:
    """Sampling defaults for requests that set nothing; else the model's own, else llama.cpp's."""

    temperature: float | None = number("temperature", None)
    """Divisor of the logits. 0: always the most likely token. Default: the model's own (its generation_config.json),
    else 0.8."""
    top_k: int | None = number("top_k", None)
    """Keep the k most likely tokens. 0: all. Default: the model's own, else 40."""
    top_p: float | None = number("top_p", None)
    """Keep the smallest set of tokens whose probabilities reach this sum. Default: the model's own, else 0.95."""
    min_p: float | None = number("min_p", None)
    """Drop tokens less likely than this share of the most likely one. Default: the model's own, else 0.05."""
    repetition_penalty: float | None = number("repetition_penalty", None)
    """Divide the logits of tokens already in the sequence by this (arXiv 1909.05858). 1: off. Default: the model's
    own, else 1."""

    def __post_init__(self) -> None:
        flags.check_fields(self)

    def fill(self, options: SamplingOptions) -> SamplingOptions:
        """Return `options` with these defaults for those that are None."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(options, **{name: value for name, value in given.items() if getattr(options, name) is None})


@dataclass(frozen=True)
class SamplingOptions(SamplingDefaults):
    """Sampling."""

    temperature: float | None = number("temperature", 0.0)
    """Divisor of the logits. 0: always the most likely token."""
    frequency_penalty: float = number("frequency_penalty", 0.0)
    """Subtract this from a token's logit for every occurrence in the answer."""
    presence_penalty: float = number("presence_penalty", 0.0)
    """Subtract this from a token's logit if it occurs in the answer."""
    seed: int | None = None
    """Seed of the sampling, which makes it repeatable."""

    def with_defaults(self, defaults: Mapping[str, float]) -> SamplingOptions:
        """Return these options with None replaced by `defaults`, else by LLAMA_CPP_DEFAULTS."""
        known: dict[str, Any] = {name: defaults.get(name, value) for name, value in LLAMA_CPP_DEFAULTS.items()}
        return SamplingDefaults(**known).fill(self)


class Sampler:
    """Draws the tokens of one answer."""

    def __init__(
        self, options: SamplingOptions, prompt: Sequence[int] = (), logit_bias: Mapping[int, float] | None = None
    ) -> None:
        """Start an answer to `prompt`. `logit_bias` {token: number} is added to logits first. -inf forbids a token."""
        options = options.with_defaults({})
        self.options = options
        # numpy refuses negative seeds, which OpenAI's API allows
        self.random = np.random.default_rng(None if options.seed is None else options.seed % 2**63)
        biases = sorted((logit_bias or {}).items())
        self._biased = np.array([token for token, _ in biases], dtype=np.intp)
        self._bias = np.array([value for _, value in biases], dtype=np.float32)
        self._counts = Counter[int]()
        """Tokens of the answer."""
        self._seen = _GrowingSet(prompt if options.repetition_penalty != 1.0 else ())
        """Distinct tokens of prompt and answer."""

    @property
    def changes_logits(self) -> bool:
        """Return True if `choose` changes the logits in place."""
        options = self.options
        penalties = (options.frequency_penalty, options.presence_penalty, options.repetition_penalty != 1.0)
        return bool(self._biased.size) or any(penalties)

    def choose(self, logits: np.ndarray) -> int:
        """Return the next token from fp32 logits [V]. Biases and penalties change the logits in place.

        A token with -inf is never drawn. Raises UnanswerableError if all have it, ArtefactError for NaN.
        """
        self._bias_and_penalize(logits)
        temperature = self.options.temperature
        assert temperature is not None
        best = int(logits.argmax())
        if np.isnan(logits[best]):  # which argmax takes for the largest
            raise ArtefactError("the model's numbers are not finite: its file may be damaged; copy or export it again")
        if logits[best] == -np.inf:
            raise UnanswerableError("logit_bias, with the grammar where there is one, forbids every token")
        return best if temperature == 0.0 else self._draw(logits, float(logits[best]), temperature)

    def push(self, token: int) -> None:
        """Add `token` to the answer, so that penalties count it."""
        if self.options.frequency_penalty or self.options.presence_penalty:
            self._counts[token] += 1
        if self.options.repetition_penalty != 1.0:
            self._seen.add(token)

    def _bias_and_penalize(self, logits: np.ndarray) -> None:
        options = self.options
        if self._biased.size:
            logits[self._biased] += self._bias
        if self._seen:
            penalize(logits, self._seen.array, options.repetition_penalty or 1.0)
        if self._counts:
            tokens = np.fromiter(self._counts, np.intp, len(self._counts))
            times = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[tokens] -= times * options.frequency_penalty + options.presence_penalty

    def _draw(self, logits: np.ndarray, best: float, temperature: float) -> int:
        """Draw a token by its probability at `temperature`, among those that top_k, then top_p, then min_p keep."""
        # only kept tokens are sorted: sorting all V takes as long as evaluating the token
        top_k, top_p, min_p = self.options.top_k or 0, self.options.top_p or 1.0, self.options.min_p or 0.0
        if 0 < top_k < len(logits):
            kept = ranked(logits, top_k)
            weights = np.exp((logits[kept].astype(np.float64) - best) / max(temperature, SMALLEST))
            total = weights.sum()
        else:
            every = _weights(logits, best, temperature)
            if not min_p and top_p == 1.0:
                return self._draw_of_all(every)
            total = every.sum(dtype=np.float64)
            # the weight of the most likely token is 1, so min_p is a limit of weights
            kept = np.flatnonzero(every >= min_p) if min_p else _nucleus(every, top_p * total)
            kept = kept[np.argsort(-every[kept], kind="stable")]
            weights = every[kept].astype(np.float64)
        sums = np.cumsum(weights)
        # a token is kept while the mass before it is below top_p, so the most likely one always is
        is_kept = (sums - weights < top_p * total) & (weights >= min_p)
        sums = sums[is_kept]
        drawn = np.searchsorted(sums, self.random.random() * sums[-1], side="right")
        return int(kept[drawn])

    def _draw_of_all(self, weights: np.ndarray) -> int:
        """Draw a block by its weight, then a token in it."""
        # a cumulative sum over all V would cost more than the rest
        starts = np.arange(0, len(weights), BLOCK)
        sums = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
        block = int(np.searchsorted(sums, self.random.random() * sums[-1], side="right"))
        start = BLOCK * block
        inside = np.cumsum(weights[start : start + BLOCK], dtype=np.float64)
        return start + int(np.searchsorted(inside, self.random.random() * inside[-1], side="right"))


BLOCK = 256
"""Tokens whose weights are summed together."""

SMALLEST = 1e-30
"""Least divisor of logits, at which the most likely token has all weight. Smaller values are not exact in fp32."""


class _GrowingSet:
    """A set of token ids that is stored as a growing array."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._known = set(tokens)
        self._ids = np.fromiter(self._known, np.intp, len(self._known))
        self._size = len(self._known)

    def __bool__(self) -> bool:
        return self._size > 0

    def add(self, token: int) -> None:
        if token in self._known:
            return
        self._known.add(token)
        if self._size == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(max(64, self._size), np.intp)])
        self._ids[self._size] = token
        self._size += 1

    @property
    def array(self) -> np.ndarray:
        return self._ids[: self._size]


def _weights(logits: np.ndarray, best: float, temperature: float) -> np.ndarray:
    """Return exp((logits - best) / temperature) in fp32, which suffices for a draw among V."""
    # less the largest one, so that exp overflows at no temperature
    shifted = logits - np.float32(best)
    shifted /= np.float32(max(temperature, SMALLEST))
    return np.exp(shifted, out=shifted)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of at least the `count` largest of `values` [V]."""
    # The count-th largest of the maxima of V / 64 columns is at most the count-th largest of all values. Every value
    # that reaches it is returned, which takes two passes and no sort.
    columns = len(values) // 64
    if count >= columns:
        return np.argpartition(values, len(values) - count)[len(values) - count :]
    maxima = values[: columns * 64].reshape(64, columns).max(axis=0)
    return np.flatnonzero(values >= np.partition(maxima, columns - count)[columns - count])


def ranked(values: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of the `count` >= 1 largest of `values` [V], the largest first."""
    found = _largest(values, count)
    return found[np.argsort(-values[found], kind="stable")][:count]


def _nucleus(weights: np.ndarray, wanted: float) -> np.ndarray:
    """Return the positions of the largest `weights` [V] whose sum is above `wanted`."""
    count = 64
    while count < len(weights):
        kept = _largest(weights, count)
        if weights[kept].sum(dtype=np.float64) > wanted:
            return kept
        count *= 8
    return np.arange(len(weights))


def penalize(logits: np.ndarray, tokens: np.ndarray, penalty: float) -> None:
    """Make distinct `tokens` less likely in place: divide positive logits by `penalty`, multiply negative ones."""
    values = logits[tokens]
    logits[tokens] = np.where(values > 0, values / penalty, values * penalty)


def log_sum(logits: np.ndarray) -> float:
    """Return log Σ exp of fp32 `logits` [V] in nats, with the sum in fp64."""
    best = logits.max()
    return float(best) + float(np.log(np.exp(logits - best).sum(dtype=np.float64)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities in nats along the last axis, in fp64 to compare nearly equal models."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
