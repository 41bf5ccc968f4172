"""The model of a run with everything that is tied to its tensors: loss, wrapped loss and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .distributed import Parallel
from .hardware import HeapWatch
from .loss import TrainingLoss
from .optimizer import AdamW, store_gradients_as_computed


@dataclass(frozen=True)
class Execution:
    """Settings that a model needs again whenever its tensors are replaced."""

    activation_checkpointing: bool = False
    compile: bool = False
    stores_gradients_as_computed: bool = False

    def configure(self, model: Any) -> None:
        """Apply the settings to a model."""
        if self.activation_checkpointing:
            model.activation_checkpointing_enable()
        if self.compile:
            torch._dynamo.reset()  # frees the code of the previous shapes
            model.model.compile()
        if self.stores_gradients_as_computed:
            store_gradients_as_computed(model)


class TrainedModel:
    """The only holder of a run's model. A compaction replaces its contents in place (see pruning/surgery.py)."""

    def __init__(
        self, loss: TrainingLoss, parallel: Parallel, execution: Execution, make_optimizer: Callable[[Any], AdamW]
    ) -> None:
        """Wrap `loss` for the ranks and create the optimizer of its model."""
        self.loss = loss.train()
        self.parallel, self.execution = parallel, execution
        execution.configure(self.model)
        self.wrapped_loss = parallel.wrap(loss)
        """Callable of a step: the loss itself, or DDP around it."""
        self.optimizer = make_optimizer(self.model)  # after the wrapping, which may shard the parameters
        self.heap = HeapWatch()

    @property
    def model(self) -> Any:
        return self.loss.model

    def replace(self, loss: TrainingLoss, wrapped_loss: nn.Module) -> None:
        """Continue with the compacted model in `loss`; the optimizer holds its parameters already."""
        self.loss, self.wrapped_loss = loss, wrapped_loss
        self.execution.configure(self.model)
