"""Pruning-aware pretraining: from a larger pretrained model to a smaller, irregular one.

from efficientllm.train import PruneConfig, RunConfig, TrainConfig, train

train(TrainConfig(pruning=PruneConfig(target_ratio=0.8), run=RunConfig(output="runs/small")))
"""

from typing import TYPE_CHECKING

from ..runtime.base.extras import lazy_names

if TYPE_CHECKING:
    from .config.pruning import PruneConfig
    from .config.sections import OptimizerConfig, RunConfig, SourceConfig, TrainConfig
    from .run import run_training as train

__all__ = ["OptimizerConfig", "PruneConfig", "RunConfig", "SourceConfig", "TrainConfig", "train"]

__getattr__ = lazy_names(
    __name__,
    {
        "OptimizerConfig": ".config.sections:OptimizerConfig",
        "PruneConfig": ".config.pruning:PruneConfig",
        "RunConfig": ".config.sections:RunConfig",
        "SourceConfig": ".config.sections:SourceConfig",
        "TrainConfig": ".config.sections:TrainConfig",
        "train": ".run:run_training",
    },
)
