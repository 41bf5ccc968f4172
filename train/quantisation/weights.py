"""A model whose matrices are, for a while or for good, what its file will hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..compute.gather import local
from ..compute.ranks import MeanOverRanks, alone
from ..model.file_types import file_types
from ..model.irregular import architecture_of
from ..model.tensors import EMBEDDING, HEAD, tensor_names
from .activations import round_to_int8
from .config import GGUF_TYPES, QuantisationConfig
from .grids import GRIDS, Grid
from .inputs import InputSquares

OTHER_TYPES = {"int4-block32": ("int4", "int4"), "8da4w": ("int4-bf16", "int8")}
"""Type -> grids of the layers' matrices and of embedding and head."""


class ShippedWeights:
    """What `--qat` does to a model: rounds its matrices in place.

    Gradients are straight-through: of the rounded weights, applied to the unrounded ones. A block's scale heeds what
    its columns are multiplied with, as far as training saw (`inputs`), where the grid leaves it a choice.
    """

    def __init__(self, settings: QuantisationConfig, mean_over_ranks: MeanOverRanks = alone) -> None:
        self.settings = settings
        self.inputs = InputSquares(mean_over_ranks)

    def grids(self, model: Any) -> dict[str, Grid]:
        """{parameter: its grid} of a model of any shape; what stays in 16 or 32 bits is left out."""
        architecture, settings = architecture_of(model.config), self.settings
        if settings.qat in GGUF_TYPES:
            head = settings.head_type
            types = file_types(architecture, settings.qat, head, head)
        else:
            body, head = OTHER_TYPES[settings.qat]
            names = [name for name in tensor_names(architecture) if name.endswith(("_proj.weight", "lm_head.weight"))]
            types = dict.fromkeys(names, body) | dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), head)
        return {name: GRIDS[kind] for name, kind in types.items() if kind in GRIDS}

    @contextlib.contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Within, the model's matrices are the rounded ones; their gradients stay when the others are back."""
        grids = self.grids(model)
        weighs = any(grid.round_weighed is not None for grid in grids.values())
        unrounded: dict[nn.Parameter, Tensor] = {}
        try:
            for name, parameter in model.named_parameters():
                if name in grids:
                    rounded = self._round(model, grids[name], name, local(parameter.data))
                    unrounded[parameter] = _exchange(parameter, rounded)
            with self._rounded_activations(model), self.inputs.watching(model) if weighs else contextlib.nullcontext():
                yield
        finally:
            for parameter, weight in unrounded.items():
                _exchange(parameter, weight)

    @torch.no_grad()
    def settle(self, model: Any) -> None:
        """Give the model the rounded weights for good."""
        grids = self.grids(model)
        for name, parameter in model.named_parameters():
            if name in grids:
                own = local(parameter)
                own.copy_(self._round(model, grids[name], name, own))

    def _round(self, model: Any, grid: Grid, name: str, weight: Tensor) -> Tensor:
        multiplies = HEAD if name == EMBEDDING and model.config.tie_word_embeddings else name
        return grid.round(weight, self.inputs.of(multiplies, weight.shape[1]))

    @contextlib.contextmanager
    def _rounded_activations(self, model: Any) -> Iterator[None]:
        """What 8da4w's products see: their inputs in int8. Elsewhere nothing."""
        handles = []
        if self.settings.qat == "8da4w":
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name != "lm_head":
                    handles.append(module.register_forward_pre_hook(lambda _, inputs: (round_to_int8(inputs[0]),)))
            # the loss reads the head's weight itself, so its input is rounded where it comes from
            handles.append(model.model.norm.register_forward_hook(lambda _, __, output: round_to_int8(output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def _exchange(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Give this rank's rows of a parameter other values; what they were."""
    if not isinstance(parameter.data, DTensor):
        before, parameter.data = parameter.data, values
        return before
    rows = local(parameter.data)  # the memory that FSDP gathers from
    before = rows.clone()
    rows.copy_(values)
    return before
