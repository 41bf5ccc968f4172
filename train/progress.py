"""Where a run stands. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    seconds: float = 0.0
    """Wall time spent training, over all resumed parts."""
