"""Saliency from activations, as the baselines measure it: the inputs of o_proj and down_proj, and their columns.

Shapes: C input channels of a matrix (query heads times D, or FFN channels), H its outputs. For a channel x_c and its
column w_c, over the tokens of the forward passes since the last step (`--saliency NAME`):

flap: var(x_c) |w_c|_2^2, divided by its mean over the matrix (FLAP, arXiv 2312.11983, eq. 5 and 6). The paper
standardises to z-scores, whose negative values would invert costs here. wanda: sqrt(mean x_c^2) |w_c|_1 (Wanda, arXiv
2306.11695, summed over outputs). minitron: mean |x_c| (Minitron, arXiv 2407.14679, eq. 1 and 2).

A head's score is the sum over its channels, a key/value group's that of its query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compute.gather import full
from ..compute.ranks import MeanOverRanks, alone
from ..model.architecture import Architecture
from .readers import ReaderScores, is_attention


@dataclass
class Moments:
    """Sums over tokens of one matrix's inputs, fp32 [C]."""

    count: int
    total: Tensor
    absolute: Tensor
    squares: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> Moments:
        """Compute the sums of inputs [..., C]."""
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


class ActivationScores(ReaderScores):
    """Scores by one of ACTIVATION_CRITERIA, from the forward passes of training."""

    def __init__(
        self,
        name: str,
        kinds: Iterable[str],
        architecture: Architecture,
        decay: float,
        mean_over_ranks: MeanOverRanks = alone,
    ) -> None:
        """Raise UsageError if the stem is in the pruning space, because these criteria do not cover it."""
        super().__init__(name, kinds, architecture, decay, mean_over_ranks)
        self.criterion = ACTIVATION_CRITERIA[name]
        self._seen: dict[str, Moments] = {}

    def look(self, name: str, inputs: Tensor) -> None:
        found = Moments.of(inputs)
        self._seen[name] = self._seen[name] + found if name in self._seen else found

    def sums(self) -> dict[str, Tensor]:
        found = {
            name: self.criterion(seen, full(self.weights[name].detach()).float()) for name, seen in self._seen.items()
        }
        self._seen = {}
        return {name: self.per_head(channels) if is_attention(name) else channels for name, channels in found.items()}

    def discard_step(self) -> None:
        self._seen = {}
