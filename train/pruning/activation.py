"""Saliency from activations, as the peers of this method measure it: what o_proj and down_proj read, and their columns.

Shapes: C input channels of a matrix (query heads times D, or FFN channels), H its outputs. For a channel x_c and its
column w_c, over the tokens of the forward passes since the last step (`--saliency NAME`):
    flap      var(x_c) |w_c|_2^2, divided by its mean over the matrix (FLAP, arXiv 2312.11983, eq. 5 and 6; there
              standardised to z-scores, which here would make costs count backwards where they are negative)
    wanda     sqrt(mean x_c^2) |w_c|_1                              (Wanda, arXiv 2306.11695, summed over outputs)
    minitron  mean |x_c|                                            (Minitron, arXiv 2407.14679, eq. 1 and 2)
A head's score is the sum over its channels, a key/value group's that of its query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.base.errors import UsageError
from ..compute.gather import full
from ..model.architecture import Architecture
from .running_scores import RunningScores


@dataclass
class Moments:
    """Sums over tokens of one matrix's inputs, fp32 [C]."""

    count: int
    total: Tensor
    absolute: Tensor
    squares: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> Moments:
        """Of inputs [..., C]."""
        x = inputs.detach().flatten(0, -2).float()
        return cls(len(x), x.sum(0), x.abs().sum(0), x.square().sum(0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.absolute + other.absolute,
            self.squares + other.squares,
        )


def _flap(seen: Moments, weight: Tensor) -> Tensor:
    variance = seen.squares / seen.count - (seen.total / seen.count).square()
    scores = variance.clamp(min=0) * weight.square().sum(0)
    return scores / scores.mean().clamp(min=torch.finfo(torch.float32).tiny)


def _wanda(seen: Moments, weight: Tensor) -> Tensor:
    return (seen.squares / seen.count).sqrt() * weight.abs().sum(0)


def _minitron(seen: Moments, weight: Tensor) -> Tensor:
    return seen.absolute / seen.count


ACTIVATION_CRITERIA: dict[str, Callable[[Moments, Tensor], Tensor]] = {
    "flap": _flap,
    "wanda": _wanda,
    "minitron": _minitron,
}
"""(moments of the inputs, weight [H, C]) -> scores of the channels, fp32 [C]."""

READERS = ("self_attn.o_proj", "mlp.down_proj")
"""Matrices whose input channels are heads' and the FFN's."""


class ActivationScores(RunningScores):
    """Scores by one of ACTIVATION_CRITERIA; it watches the model's forward passes in training."""

    def __init__(
        self,
        name: str,
        kinds: Iterable[str],
        architecture: Architecture,
        decay: float,
        mean_over_ranks: Callable[[Iterable[Tensor]], None],
    ) -> None:
        """UsageError where the stem is to be pruned: it has no channel that these criteria look at."""
        super().__init__(kinds, architecture, decay)
        if "stem" in self.kinds:
            raise UsageError(f"--saliency {name} ranks attention and ffn only; leave stem out of --prune")
        self.criterion = ACTIVATION_CRITERIA[name]
        self.mean_over_ranks = mean_over_ranks
        self._seen: dict[str, Moments] = {}
        self._weights: dict[str, Any] = {}
        self._handles: list[Any] = []

    def attach(self, model: Any) -> None:
        self.detach()
        modules = {name: module for name, module in model.named_modules() if name.endswith(READERS)}
        self._handles = [module.register_forward_pre_hook(self._observer(name)) for name, module in modules.items()]
        self._weights = {name: module.weight for name, module in modules.items()}

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _observer(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if module.training:
                found = Moments.of(arguments[0])
                self._seen[name] = self._seen[name] + found if name in self._seen else found

        return observe

    @torch.no_grad()
    def finish_step(self) -> None:
        channels = {
            name: self.criterion(seen, full(self._weights[name].detach()).float()) for name, seen in self._seen.items()
        }
        self.discard_step()
        self.mean_over_ranks(channels.values())
        self._average({kind: [self._scores(kind, layer, channels) for layer in self._layers()] for kind in self.kinds})

    def discard_step(self) -> None:
        self._seen = {}

    def _layers(self) -> range:
        return range(len(self.architecture.layers))

    def _scores(self, kind: str, layer: int, channels: dict[str, Tensor]) -> Tensor:
        """One score per group of a kind in a layer; [0] where the layer has none."""
        shape = self.architecture.layers[layer]
        reader = READERS[1] if kind == "ffn" else READERS[0]
        found = channels.get(f"model.layers.{layer}.{reader}")
        if found is None:
            return torch.zeros(0)
        if kind == "ffn":
            return found
        groups = shape.num_key_value_heads if kind == "kv_group" else shape.num_attention_heads
        return found.view(groups, -1).sum(1)
