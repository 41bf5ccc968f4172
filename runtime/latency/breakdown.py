"""Where the milliseconds of a workload go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of a workload by part."""

    attention_ms: tuple[float, ...]
    """Of each layer."""
    ffn_ms: tuple[float, ...]
    """Of each layer."""
    head_ms: float
    """The LM head."""
    token_ms: float
    """What every token costs beside layers and head: embedding, last norm, the engine's own work."""

    @property
    def total_ms(self) -> float:
        return sum(self.attention_ms) + sum(self.ffn_ms) + self.head_ms + self.token_ms
