"""Replace a model's matrices by their rounded values, temporarily or for good.

The mean squares of the inputs weight the rounding errors of each column. For 8da4w, activations are rounded as
dynamically quantised products see them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..compute.distributed import MeanOverRanks, local, single_rank
from ..config.sections import GGUF_TYPES, QuantisationConfig
from ..model.file_types import file_types
from ..model.irregular import architecture_of
from ..model.tensors import EMBEDDING, FINAL_NORM, HEAD, same_input, tensor_names
from .grids import GRIDS, Grid

DECAY = 0.9
"""Decay of the average, per optimizer step."""

LOWEST, HIGHEST = -128, 127
SMALLEST = torch.finfo(torch.float32).eps
"""Smallest scale, as in torchao."""

OTHER_TYPES = {"int4-block32": ("int4", "int4"), "8da4w": ("int4-bf16", "int8")}
"""Type -> grids of the layers' matrices and of embedding and head."""


class InputSquares:
    """Mean squares of the inputs of every matrix over past steps, as in llama.cpp's importance matrix."""

    def __init__(self, mean_over_ranks: MeanOverRanks = single_rank) -> None:
        self._mean_over_ranks = mean_over_ranks
        self._means: dict[str, Tensor] = {}
        """{observed module: fp32 [in]}. For the final norm its output, which the head reads."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def of(self, parameter: str, columns: int) -> Tensor | None:
        """Return fp32 [in] for a matrix with that many columns, or None if nothing, or another width, was observed."""
        found = next((self._means[name] for name in _observed_for(parameter) if name in self._means), None)
        return found if found is not None and len(found) == columns else None

    @contextlib.contextmanager
    def observing(self, model: Any) -> Iterator[None]:
        """Average the inputs of the matrices of `model` during training in this block. A failed block adds nothing."""
        norm = model.get_submodule(FINAL_NORM)
        observed = tuple(same_input(architecture_of(model.config).parts))
        with contextlib.ExitStack() as hooks:
            for name, module in model.named_modules():
                if name.endswith(observed):
                    hooks.enter_context(module.register_forward_pre_hook(self._input_hook(name)))
            hooks.enter_context(
                norm.register_forward_hook(lambda module, _, output: self._observe(FINAL_NORM, module, output))
            )
            try:
                yield
                self._average()
            finally:
                self._sums, self._counts = {}, {}

    def _input_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: self._observe(name, module, inputs[0])

    @torch.no_grad()
    def _observe(self, name: str, module: nn.Module, values: Tensor) -> None:
        if module.training:
            rows = values.detach().flatten(0, -2)
            squares = rows.square().sum(0, dtype=torch.float32)  # a bf16 sum of many squares would stop growing
            self._sums[name] = squares if name not in self._sums else self._sums[name] + squares
            self._counts[name] = self._counts.get(name, 0) + len(rows)

    @torch.no_grad()
    def _average(self) -> None:
        new = {name: total / self._counts[name] for name, total in self._sums.items()}
        if not new:  # a measurement: no step of training
            return
        self._mean_over_ranks(new.values())
        for name, mean in new.items():
            if not bool(mean.isfinite().all()):  # such a step is skipped, and must not spoil the average
                continue
            before = self._means.get(name)
            if before is not None and before.shape == mean.shape:  # it was not pruned since
                mean = before.lerp(mean, 1 - DECAY)
            self._means[name] = mean

    def state_dict(self) -> dict[str, Tensor]:
        return self._means

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._means = dict(state)


def _observed_for(parameter: str) -> Sequence[str]:
    """Return the observed modules for a matrix. The first observed one counts."""
    if parameter == HEAD:  # the loss multiplies with its weight and does not call the module
        return (FINAL_NORM,)
    name = parameter.removesuffix(".weight")
    layer, _, matrix = name.rpartition(".self_attn.")
    if layer and matrix in ("k_proj", "v_proj"):
        return (f"{layer}.self_attn.q_proj",)
    layer, _, matrix = name.rpartition(".mlp.")
    return (f"{layer}.mlp.gate_proj", name) if layer and matrix == "up_proj" else (name,)


class _RoundToInt8(torch.autograd.Function):
    """Straight-through rounding: the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return values [..., N] on 256 levels between the least and the largest of each row, zero included."""
        x = values.float()
        low = x.amin(-1, keepdim=True).clamp(max=0)
        high = x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (HIGHEST - LOWEST)).clamp(min=SMALLEST)
        zero = (LOWEST - (low / scale).round()).clamp(LOWEST, HIGHEST)
        codes = ((x / scale).round() + zero).clamp(LOWEST, HIGHEST)
        return ((codes - zero) * scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def round_to_int8(values: Tensor) -> Tensor:
    """Round [..., H] token by token to 256 steps between the least and the largest value, with 0 included.

    This is XNNPACK's dynamically quantised product, torchao's per-token asymmetric int8.
    """
    return _RoundToInt8.apply(values)  # type: ignore[return-value]


class RoundedWeights:
    """Effect of `--qat` on a model: round its matrices in place.

    Gradients are straight-through: those of the rounded weights are applied to the unrounded ones. If the grid leaves a
    choice, a block's scale depends on the observed inputs of its columns (`inputs`).
    """

    def __init__(self, settings: QuantisationConfig, mean_over_ranks: MeanOverRanks = single_rank) -> None:
        self.settings = settings
        self.inputs = InputSquares(mean_over_ranks)

    def grids(self, model: Any) -> dict[str, Grid]:
        """Return {parameter: its grid} of a model of any shape. Tensors in 16 or 32 bits are not included."""
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
        """Use the rounded matrices in this block. Their gradients stay after the others are restored."""
        grids = self.grids(model)
        uses_inputs = any(grid.round_weighted is not None for grid in grids.values())
        observing = self.inputs.observing(model) if uses_inputs else contextlib.nullcontext()
        unrounded: dict[nn.Parameter, Tensor] = {}
        try:
            # a rank rounds its own rows: a block lies within a row, and FSDP shards by rows
            for name, parameter in model.named_parameters():
                if name in grids:
                    rounded = self._round(model, grids[name], name, local(parameter.data))
                    unrounded[parameter] = _exchange(parameter, rounded)
            with self._rounded_activations(model), observing:
                yield
        finally:
            for parameter, weight in unrounded.items():
                _exchange(parameter, weight)

    @torch.no_grad()
    def make_permanent(self, model: Any) -> None:
        """Replace the weights of the model by the rounded ones."""
        grids = self.grids(model)
        for name, parameter in model.named_parameters():
            if name in grids:
                own = local(parameter)
                own.copy_(self._round(model, grids[name], name, own))

    def _round(self, model: Any, grid: Grid, name: str, weight: Tensor) -> Tensor:
        # only as the head does a tied matrix multiply an input
        multiplies = HEAD if name == EMBEDDING and model.config.tie_word_embeddings else name
        return grid.round(weight, self.inputs.of(multiplies, weight.shape[1]))

    @contextlib.contextmanager
    def _rounded_activations(self, model: Any) -> Iterator[None]:
        """Round the inputs of products to int8 for 8da4w. Do nothing for other types."""
        if self.settings.qat != "8da4w":
            yield
            return
        with contextlib.ExitStack() as hooks:
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name != "lm_head":
                    hooks.enter_context(module.register_forward_pre_hook(lambda _, inputs: (round_to_int8(inputs[0]),)))
            # the loss reads the head's weight itself, so its input is rounded where it comes from
            hooks.enter_context(model.model.norm.register_forward_hook(lambda _, __, output: round_to_int8(output)))
            yield


@torch.no_grad()
def _exchange(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Exchange this rank's rows of a parameter and return the old values."""
    if not isinstance(parameter.data, DTensor):
        before, parameter.data = parameter.data, values
        return before
    rows = local(parameter.data)  # the memory that FSDP gathers from
    before = rows.clone()
    rows.copy_(values)
    return before
