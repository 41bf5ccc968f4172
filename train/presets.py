"""Named starting points for `efficientllm-train --preset NAME`. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from ..runtime.errors import UsageError
from .config import OptimizerConfig, PruneConfig, RunConfig, SourceConfig, TrainConfig


def cpu_quickstart() -> TrainConfig:
    """SmolLM2-135M to 85 % on two CPU cores in about five minutes: a demonstration, not a good model."""
    return TrainConfig(
        source=SourceConfig(sequence_length=256, eval_tokens=8192),
        pruning=PruneConfig(target_ratio=0.85, prune_end=0.5),
        optimizer=OptimizerConfig(tokens=102_400, batch_size=4),
        run=RunConfig(checkpoint_every=50),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {"cpu-quickstart": cpu_quickstart}


def preset(name: str) -> TrainConfig:
    if name not in PRESETS:
        raise UsageError(f"--preset {name}: unknown; known: {', '.join(PRESETS)}")
    return PRESETS[name]()
