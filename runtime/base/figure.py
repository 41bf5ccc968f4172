"""A measured quantity as median and quartiles."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One quantity over all repetitions."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Of at least one value; quartiles are inclusive, those of a single value are the value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    @property
    def digits(self) -> int:
        """Behind the point, so that two or three are shown."""
        return 0 if self.median >= 20 else 1 if self.median >= 2 else 2

    def describe(self, digits: int = 1, unit: str = "") -> str:
        """'median unit (low-high)'."""
        unit = f" {unit}" if unit else ""
        return f"{self.median:.{digits}f}{unit} ({self.low:.{digits}f}-{self.high:.{digits}f})"
