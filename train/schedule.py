"""Size and learning rate as functions of the tokens. Imports no torch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from .config.sections import OptimizerConfig


@dataclass(frozen=True)
class DroppingSchedule:
    """Continuous parameter dropping (EfficientLLM, figure 2c), or dropping in equal steps.

    The budget's measure (parameters, bytes of the exported file or milliseconds) falls linearly in tokens.
    """

    source: float
    target: float
    start_tokens: int
    """Tokens before the first removal, so that saliency is an average."""
    end_tokens: int
    """Tokens at which the target is reached."""
    removals: int = 0
    """Number of equal steps, the first at the start and the last at the end. 0: continuous."""
    sizes: tuple[float, ...] = ()
    """Larger sizes to reach on the way, largest first. Each ends a step. The steps between two are equal."""

    def target_at(self, tokens: int) -> float:
        """Return the largest allowed size after `tokens`."""
        if tokens >= self.end_tokens:
            return self.target
        if tokens < self.start_tokens:
            return self.source
        share = (tokens - self.start_tokens) / (self.end_tokens - self.start_tokens)
        if not self.removals:
            return self.source + share * (self.target - self.source)
        levels = self._levels()
        return levels[math.floor(share * (len(levels) - 1))]

    def _levels(self) -> list[float]:
        """Return the sizes after each step."""
        levels = []
        for larger, smaller in itertools.pairwise((self.source, *self.sizes, self.target)):
            share = (larger - smaller) / (self.source - self.target)
            number = max(1, round(self.removals * share))
            levels += [larger + index / number * (smaller - larger) for index in range(1, number)]
            levels.append(smaller)
        return levels


def learning_rate(settings: OptimizerConfig, tokens: int) -> float:
    """Return the learning rate of the step that ends after `tokens`. The first is not zero, the last is the floor.

    It rises linearly over the warm-up. 'wsd' (warmup-stable-decay) then stays at the peak and falls linearly to the
    floor in the last part of the run. 'cosine' follows half a cosine to the floor. 'constant' stays.
    """
    total, peak, floor, shape = settings.tokens, settings.learning_rate, settings.lr_floor, settings.lr_schedule
    warmup = round(settings.lr_warmup * total)
    if tokens < warmup:
        return peak * (tokens / warmup)
    start = round((1 - settings.lr_decay) * total) if shape == "wsd" else warmup
    if shape == "constant" or tokens <= start or total <= start:
        return peak
    progress = min(1.0, (tokens - start) / (total - start))
    if shape == "cosine":
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    return peak * (1.0 - (1.0 - floor) * progress)
