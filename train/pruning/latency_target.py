"""`--target-latency`: a share of the source's time, or milliseconds. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

EXAMPLE = "give a share of the source's time as 0.6x, or milliseconds as 8ms"


@dataclass(frozen=True)
class LatencyTarget:
    """A share, or milliseconds; exactly one of them."""

    share: float | None = None
    ms: float | None = None

    @classmethod
    def parse(cls, text: str) -> LatencyTarget:
        """Parse 0.6x or 8ms. Raises ValueError for anything else."""
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(x|ms)\s*", text)
        if match is None or float(match.group(1)) <= 0:
            raise ValueError(EXAMPLE)
        amount = float(match.group(1))
        if match.group(2) == "ms":
            return cls(ms=amount)
        if amount > 1:
            raise ValueError(f"a share is at most 1x; {EXAMPLE}")
        return cls(share=amount)

    def of(self, source_ms: float) -> float:
        """Return the milliseconds for a source that takes `source_ms`."""
        return self.ms if self.ms is not None else (self.share or 1.0) * source_ms
