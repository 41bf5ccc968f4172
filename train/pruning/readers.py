"""Scores of heads and FFN channels from the inputs of o_proj and down_proj: the common base of such criteria."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.base.errors import UsageError
from ..compute.ranks import MeanOverRanks
from ..model.architecture import Architecture
from ..model.tensors import is_stem_norm
from .groups import counts
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
