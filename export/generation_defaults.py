"""How a checkpoint asks to be sampled: its generation_config.json under the names of our own options."""

from __future__ import annotations

from .checkpoint import Checkpoint

CHAT_DEFAULTS = {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1}
"""Those of the server's chat page, where the checkpoint says nothing."""

RANGES = {"temperature": (0.0, 2.0), "top_p": (0.01, 1.0), "repetition_penalty": (0.5, 2.0)}


def generation_defaults(checkpoint: Checkpoint) -> dict[str, float]:
    """{temperature, top_p, repetition_penalty}; what is missing, of another type or out of range is ours."""
    found = checkpoint.json_file("generation_config.json")
    chosen = dict(CHAT_DEFAULTS)
    for name, (low, high) in RANGES.items():
        value = found.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            chosen[name] = float(value)
    return chosen
