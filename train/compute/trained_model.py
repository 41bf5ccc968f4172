"""The model of a run with everything that is tied to its tensors: loss, wrapped loss and optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .causal_blocks import choose_attention
from .distributed import Parallel
from .hardware import HeapWatch
from .loss import TrainingLoss
from .optimizer import AdamW, store_gradients_as_computed


def configure(
    model: Any, device: torch.device, activation_checkpointing: bool, compiles: bool, stores_gradients_as_computed: bool
) -> None:
    """Apply execution settings to a model that computes on `device`."""
    if activation_checkpointing:
        model.activation_checkpointing_enable()
    if compiles:
        torch._dynamo.reset()  # frees the code of the previous shapes
        # Compiled layers share code if their shapes are the same, and the mask is made outside of them: a decoder
        # compiled as a whole has one that keeps attention from its fast kernels (transformers 5). torch does not trace
        # a layer within a checkpoint that is not compiled (2.13).
        modules = [model.model] if activation_checkpointing else list(model.model.layers)
        for layer in model.model.layers if activation_checkpointing else ():
            _drop_choice_of_kernels(layer.self_attn)
        torch._dynamo.config.recompile_limit = 8 * len(model.model.layers)
        for module in modules:
            module.compile()
    else:
        choose_attention(model, device)
    if stores_gradients_as_computed:
        store_gradients_as_computed(model)


def _drop_choice_of_kernels(attention: torch.nn.Module) -> None:
    """Undo the wrapper of transformers 5.25. Within a checkpoint, torch does not trace the global that it sets."""
    forward = type(attention).forward
    if forward.__globals__["__name__"].startswith("kernels."):
        attention.forward = inspect.unwrap(forward).__get__(attention)


class TrainedModel:
    """The only holder of a run's model. A compaction replaces its contents in place (see pruning/surgery.py)."""

    def __init__(
        self,
        loss: TrainingLoss,
        parallel: Parallel,
        configure_model: Callable[[Any], None],
        make_optimizer: Callable[[Any], AdamW],
        read_weights: Callable[[Any], None] | None = None,
    ) -> None:
        """Wrap `loss` for the ranks and create the optimizer. A compacted model is configured again.

        `read_weights` fills a model that is wrapped without memory.
        """
        self.loss, self.parallel, self.configure_model = loss.train(), parallel, configure_model
        configure_model(self.model)
        self.wrapped_loss = parallel.wrap(loss)
        """Callable of a step: the loss itself, or DDP around it."""
        if read_weights is not None:
            read_weights(self.model)
        self.optimizer = make_optimizer(self.model)  # after the wrapping, which may shard the parameters
        self.heap = HeapWatch()

    @property
    def model(self) -> Any:
        return self.loss.model

    def replace(self, loss: TrainingLoss, wrapped_loss: nn.Module) -> None:
        """Continue with the compacted model in `loss`. The optimizer holds its parameters already."""
        self.loss, self.wrapped_loss = loss, wrapped_loss
        self.configure_model(self.model)
