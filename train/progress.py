"""Where a run stands. Imports no torch."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

SPEED_SECONDS = 60.0
"""What a shown speed is the mean of."""


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    skipped_in_a_row: int = 0
    """Steps just skipped for a non-finite loss or gradient."""
    perplexity: dict[str, float] = field(default_factory=dict)
    """Held-out perplexities: source, after_pruning, final."""
    bits_per_byte: dict[str, float] = field(default_factory=dict)
    """The same text's, where the vocabulary may shrink."""
    quality: dict[str, Any] = field(default_factory=dict)
    """Quality (see evaluation.quality) of source and final, as JSON values."""
    seconds: float = 0.0
    """Wall time spent training, over all resumed parts."""


class Speed:
    """Of the steps of the last minute; what lies between them (evaluation, checkpoints) does not count."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque()
        """(tokens, seconds)"""

    def add(self, tokens: int, seconds: float) -> None:
        """One step."""
        self._steps.append((tokens, seconds))
        while sum(each for _, each in self._steps) - self._steps[0][1] >= SPEED_SECONDS:
            self._steps.popleft()

    @property
    def tokens_per_second(self) -> float:
        """0 before the first step."""
        seconds = sum(each for _, each in self._steps)
        return sum(tokens for tokens, _ in self._steps) / seconds if seconds else 0.0
