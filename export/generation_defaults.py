"""How a checkpoint asks to be sampled: its generation_config.json under the names of our own options."""

from __future__ import annotations

from .checkpoint import Checkpoint

CHAT_DEFAULTS = {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1}
"""Those of the server's chat page, where the checkpoint says nothing."""

RANGES = {"temperature": (0.0, 2.0), "top_p": (0.01, 1.0), "repetition_penalty": (0.5, 2.0)}


def generation_defaults(checkpoint: Checkpoint) -> dict[str, float]:
    """{temperature, top_p, repetition_penalty}; what is missing, of another type or out of range is ours."""
    given = checkpoint.sampling
    chosen = {name: float(given[name]) for name, (low, high) in RANGES.items() if low <= given.get(name, -1) <= high}
    return CHAT_DEFAULTS | chosen
