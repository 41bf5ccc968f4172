"""Saliency from activations, as the baselines measure it: the inputs of o_proj and down_proj, and their columns.

Shapes: C input channels of a matrix (query heads times D, or FFN channels), H its outputs. For a channel x_c and its
column w_c, over the tokens of the forward passes since the last step (`--saliency NAME`):

flap: var(x_c) |w_c|_2^2, divided by its mean over the matrix (FLAP, arXiv 2312.11983, eq. 5 and 6). The paper
standardises to z-scores, whose negative values would invert costs here. wanda: sqrt(mean x_c^2) |w_c|_1 (Wanda, arXiv
2306.11695, summed over outputs). minitron: mean |x_c| (Minitron, arXiv 2407.14679, eq. 1 and 2).

A head's score is the sum over its channels, a key/value group's that of its query heads.

Scores of heads and FFN channels from the inputs of o_proj and down_proj: the common base of such criteria.

Saliency of a group as the Fisher information of a gate before it (`--saliency token-fisher`).

Let x_tc be an input channel c of o_proj or down_proj at token t, and g_tc the gradient of the loss there. Closing a
gate on a head (its D channels together) or on an FFN channel changes the loss by about 1/2 sum_t (sum_c g_tc x_tc)^2
(Fisher pruning: Theis et al. 2018, arXiv 1801.05787, eq. 7, with every token as a sample). `fisher` forms the same
square over a whole microbatch, of which a step has few. The tokens of a step are hundreds of samples, so this ranking
has much less noise: a one-shot removal with a fit ends at 0.41 nats instead of 0.49 (research/log). A stem channel has
a gate after every norm that reads it. Its score is the square of the sum of their roots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.base.errors import UsageError
from ..compute.distributed import MeanOverRanks, alone, full
from ..model.architecture import Architecture
from ..model.groups import counts
from ..model.tensors import is_stem_norm
from .criteria import TOKEN_FISHER
from .running_scores import RunningScores

READERS = ("self_attn.o_proj", "mlp.down_proj")
"""Matrices whose input channels belong to heads and to the FFN."""


def is_attention(name: str) -> bool:
    """Tell whether a matrix of READERS belongs to an attention."""
    return name.endswith(READERS[0])


class ReaderScores(RunningScores):
    """Observer of the inputs of every matrix of READERS in training, with one score per FFN channel and query head."""

    sees_stem = False
    """Whether the outputs of the stem's norms are observed as well."""

    def __init__(
        self,
        name: str,
        kinds: Iterable[str],
        architecture: Architecture,
        decay: float,
        mean_over_ranks: MeanOverRanks,
    ) -> None:
        """Raise UsageError if the stem is in the pruning space and not observed."""
        super().__init__(kinds, architecture, decay)
        if "stem" in self.kinds and not self.sees_stem:
            raise UsageError(f"--saliency {name} ranks attention and ffn only; leave stem out of --prune")
        if "stem" in self.kinds and not {"before_attention", "before_ffn"} >= architecture.parts.norms.keys():
            raise UsageError(
                f"--saliency {name} sees the stem where norms read it, and {architecture.family} has norms behind its "
                "blocks; leave stem out of --prune, or use --saliency taylor1"
            )
        self.mean_over_ranks = mean_over_ranks
        self.weights: dict[str, Any] = {}
        """Weight [H, C] of every observed matrix."""
        self._handles: list[Any] = []

    def look(self, name: str, inputs: Tensor) -> None:
        """Observe inputs [..., C] of the named matrix in a training forward pass."""
        raise NotImplementedError

    def sums(self) -> dict[str, Tensor]:
        """Return and forget the observations since the last call: {matrix: scores of FFN channels [I] or heads}."""
        raise NotImplementedError

    def attach(self, model: Any) -> None:
        self.detach()
        modules = {name: module for name, module in model.named_modules() if name.endswith(READERS)}
        self._handles = [module.register_forward_pre_hook(self._observer(name)) for name, module in modules.items()]
        self.weights = {name: module.weight for name, module in modules.items()}
        if "stem" in self.kinds:
            self._handles += [
                module.register_forward_hook(self._output_observer(name))
                for name, module in model.named_modules()
                if self._is_stem_norm(name) and not isinstance(module, nn.Identity)
            ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _is_stem_norm(self, module: str) -> bool:
        return is_stem_norm(f"{module}.weight", self.architecture)

    def _observer(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if module.training:
                self.look(name, arguments[0])

        return observe

    def _output_observer(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def observe(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if module.training:
                self.look(name, output)

        return observe

    @torch.no_grad()
    def finish_step(self) -> None:
        found = self.sums()
        self.mean_over_ranks(found.values())
        layers = {kind: range(len(counts(kind, self.architecture))) for kind in self.kinds}
        self._average({kind: [self._scores(kind, layer, found) for layer in layers[kind]] for kind in self.kinds})

    def per_head(self, channels: Tensor) -> Tensor:
        """Sum channels [..., heads * D] over each head: [..., heads]."""
        return channels.unflatten(-1, (-1, self.architecture.head_dim)).sum(-1)

    def _scores(self, kind: str, layer: int, found: dict[str, Tensor]) -> Tensor:
        """Return one score per group of a kind in a layer, [0] if it has none.

        A key/value group's score is that of its heads. A stem channel has a gate before each reader of the stream. The
        gates close together, so amplitudes add up.
        """
        if kind == "stem":
            parts = [scores.sqrt() for name, scores in found.items() if self._is_stem_norm(name)]
            return torch.stack(parts).sum(0).square()
        scores = found.get(f"model.layers.{layer}.{READERS[kind == 'ffn']}")
        if scores is None:
            return torch.zeros(0, device=next((each.device for each in found.values()), None))
        return (
            scores.view(self.architecture.layers[layer].num_key_value_heads, -1).sum(1)
            if kind == "kv_group"
            else scores
        )


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


class GateScores(ReaderScores):
    """Scores by the Fisher information of gates.

    It keeps the inputs of o_proj and down_proj until their backward pass, also under activation checkpointing, which
    would drop them.
    """

    sees_stem = True

    def __init__(
        self,
        kinds: Iterable[str],
        architecture: Architecture,
        decay: float,
        mean_over_ranks: MeanOverRanks = alone,
    ) -> None:
        super().__init__(TOKEN_FISHER, kinds, architecture, decay, mean_over_ranks)
        self._squares: dict[str, Tensor] = {}

    def look(self, name: str, inputs: Tensor) -> None:
        if inputs.requires_grad:
            inputs.register_hook(self._gradient_observer(name, inputs.detach()))

    def _gradient_observer(self, name: str, inputs: Tensor) -> Callable[[Tensor], None]:
        def observe(gradient: Tensor) -> None:
            changes = gradient.float() * inputs.float()  # of the loss, by closing a channel at a token [..., C]
            changes = self.per_head(changes) if is_attention(name) else changes
            squares = changes.flatten(0, -2).square().sum(0)
            self._squares[name] = self._squares[name] + squares if name in self._squares else squares

        return observe

    def sums(self) -> dict[str, Tensor]:
        squares, self._squares = self._squares, {}
        return squares

    def discard_step(self) -> None:
        self._squares = {}
