"""How much an error of each column of a matrix matters: the mean squares of what the model multiplies it with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compute.ranks import MeanOverRanks, alone
from ..model.irregular import architecture_of
from ..model.tensors import FINAL_NORM, HEAD, same_input

DECAY = 0.9
"""Weight of the past, per optimizer step."""


class InputSquares:
    """Mean squares of the inputs of every matrix over the training steps seen so far: llama.cpp's importance matrix,
    of the model as it changes."""

    def __init__(self, mean_over_ranks: MeanOverRanks = alone) -> None:
        self._mean_over_ranks = mean_over_ranks
        self._means: dict[str, Tensor] = {}
        """{module whose input is observed: fp32 [in]}; of the final norm its output, which the head reads."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def of(self, parameter: str, columns: int) -> Tensor | None:
        """fp32 [in] for a matrix of so many columns; None where nothing was seen of it, or of another width."""
        found = next((self._means[name] for name in _observed_for(parameter) if name in self._means), None)
        return found if found is not None and len(found) == columns else None

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Average in what the matrices of `model` read within, in training; nothing where that fails."""
        handles = [module.register_forward_pre_hook(self._input_of(name)) for name, module in _watched(model)]
        norm = model.get_submodule(FINAL_NORM)
        handles.append(norm.register_forward_hook(self._output_of(FINAL_NORM)))
        try:
            yield
            self._average()
        finally:
            self._sums, self._counts = {}, {}
            for handle in handles:
                handle.remove()

    def _input_of(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: self._look(name, module, arguments[0])

    def _output_of(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, _, output: self._look(name, module, output)

    @torch.no_grad()
    def _look(self, name: str, module: nn.Module, values: Tensor) -> None:
        if module.training:
            rows = values.detach().flatten(0, -2)
            squares = rows.square().sum(0, dtype=torch.float32)
            self._sums[name] = squares if name not in self._sums else self._sums[name] + squares
            self._counts[name] = self._counts.get(name, 0) + len(rows)

    @torch.no_grad()
    def _average(self) -> None:
        new = {name: total / self._counts[name] for name, total in self._sums.items()}
        if not new:  # a measurement: no step of training
            return
        self._mean_over_ranks(new.values())
        for name, mean in new.items():
            if not bool(mean.isfinite().all()):
                continue
            before = self._means.get(name)
            if before is not None and before.shape == mean.shape:  # it was not pruned since
                mean = before.lerp(mean, 1 - DECAY)
            self._means[name] = mean

    def state_dict(self) -> dict[str, Tensor]:
        return self._means

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._means = dict(state)


def _watched(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose input is that of one matrix or several."""
    names = tuple(same_input(architecture_of(model.config).parts))
    return ((name, module) for name, module in model.named_modules() if name.endswith(names))


def _observed_for(parameter: str) -> Sequence[str]:
    """The module that shows what a matrix reads: the first of these that is watched."""
    if parameter == HEAD:
        return (FINAL_NORM,)
    name = parameter.removesuffix(".weight")
    layer, _, matrix = name.rpartition(".self_attn.")
    if layer and matrix in ("k_proj", "v_proj"):
        return (f"{layer}.self_attn.q_proj",)
    layer, _, matrix = name.rpartition(".mlp.")
    return (f"{layer}.mlp.gate_proj", name) if layer and matrix == "up_proj" else (name,)
