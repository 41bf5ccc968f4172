"""Saliency of heads and FFN channels from the inputs of o_proj and down_proj (`--saliency NAME`).

Shapes: C input channels of a matrix (query heads times D, or FFN channels), H its outputs. A head's score is the sum
over its channels, a key/value group's that of its query heads. Criteria from activations x_c and the column w_c of a
channel, over the tokens since the last step:

flap: var(x_c) |w_c|_2^2, divided by its mean over the matrix (FLAP, arXiv 2312.11983, eq. 5 and 6). The paper
standardises to z-scores, whose negative values would invert costs here. wanda: sqrt(mean x_c^2) |w_c|_1 (Wanda, arXiv
2306.11695, summed over outputs). minitron: mean |x_c| (Minitron, arXiv 2407.14679, eq. 1 and 2).

token-fisher is the Fisher information of a gate before a group. Let x_tc be the input of channel c at token t, and g_tc
the gradient of the loss there. Closing a gate on a head (its D channels together) or on an FFN channel changes the loss
by about 1/2 sum_t (sum_c g_tc x_tc)^2 (Fisher pruning: Theis et al. 2018, arXiv 1801.05787, eq. 7, with every token as
a sample). `fisher` forms the same square over a whole microbatch, of which a step has few. The tokens of a step are
hundreds of samples, so this ranking has much less noise: a one-shot removal with a fit ends at 0.41 nats instead of
0.49 (research/log). A stem channel has a gate after every norm that reads it. Its score is the square of the sum of
their roots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.base.errors import UsageError
from ..compute.distributed import MeanOverRanks, full, single_rank
from ..model.architecture import Architecture
from ..model.groups import counts
from ..model.tensors import is_stem_norm
from .criteria import ACTIVATION_CRITERIA, TOKEN_FISHER, Moments
from .running_scores import RunningScores

READERS = ("self_attn.o_proj", "mlp.down_proj")
"""Matrices whose input channels belong to heads and to the FFN."""


class ReaderScores(RunningScores):
    """Observer of the inputs of every matrix of READERS in training, with one score per FFN channel and query head."""

    observes_stem = False
    """Whether the outputs of the stem's norms are observed as well."""

    def __init__(
        self, name: str, kinds: Iterable[str], architecture: Architecture, decay: float, mean_over_ranks: MeanOverRanks
    ) -> None:
        """Raise UsageError if the stem is in the pruning space and not observed."""
        super().__init__(kinds, architecture, decay)
        if "stem" in self.kinds and not self.observes_stem:
            raise UsageError(f"--saliency {name} ranks attention and ffn only; remove stem from --prune")
        if "stem" in self.kinds and not {"before_attention", "before_ffn"} >= architecture.parts.norms.keys():
            raise UsageError(
                f"--saliency {name} observes the stem before each block, and {architecture.family} has norms after its "
                "blocks; remove stem from --prune, or use --saliency taylor1"
            )
        self.mean_over_ranks = mean_over_ranks
        self.weights: dict[str, Any] = {}
        """Weight [H, C] of every observed matrix."""
        self._handles: list[Any] = []

    def observe(self, name: str, values: Tensor) -> None:
        """Observe values [..., C] of the named module in a training forward pass."""
        raise NotImplementedError

    def pop_scores(self) -> dict[str, Tensor]:
        """Return and discard the scores since the last call: {module: [FFN channels, heads or stem channels]}."""
        raise NotImplementedError

    def attach(self, model: Any) -> None:
        self.detach()
        self.weights = {}
        for name, module in model.named_modules():
            if name.endswith(READERS):
                self.weights[name] = module.weight
                self._handles.append(module.register_forward_pre_hook(self._input_hook(name)))
            elif "stem" in self.kinds and self._is_stem_norm(name) and not isinstance(module, nn.Identity):
                self._handles.append(module.register_forward_hook(self._output_hook(name)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _is_stem_norm(self, module: str) -> bool:
        return is_stem_norm(f"{module}.weight", self.architecture)

    # Evaluations and measurements of block prices run the same modules in eval mode, and must not count as training.
    def _input_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: self.observe(name, arguments[0]) if module.training else None

    def _output_hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, _, output: self.observe(name, output) if module.training else None

    @torch.no_grad()
    def finish_step(self) -> None:
        found = self.pop_scores()
        self.mean_over_ranks(found.values())
        observed = {}
        for kind in self.kinds:
            layers = range(len(counts(kind, self.architecture)))
            observed[kind] = [self._scores(kind, layer, found) for layer in layers]
        self._average(observed)

    def sum_channels(self, name: str, channels: Tensor) -> Tensor:
        """Sum the channels [..., heads * D] of each head to [..., heads]. FFN and stem channels are unchanged."""
        if not name.endswith(READERS[0]):
            return channels
        return channels.unflatten(-1, (-1, self.architecture.head_dim)).sum(-1)

    def _scores(self, kind: str, layer: int, found: dict[str, Tensor]) -> Tensor:
        """Return one score per group of a kind in a layer, [0] if it has none.

        A stem channel has a gate before each reader of the stream. The gates close together, so amplitudes add up.
        """
        if kind == "stem":
            parts = [scores.sqrt() for name, scores in found.items() if self._is_stem_norm(name)]
            return torch.stack(parts).sum(0).square()
        reader = "mlp.down_proj" if kind == "ffn" else "self_attn.o_proj"
        scores = found.get(f"model.layers.{layer}.{reader}")
        if scores is None:  # the block was removed; its empty scores are averaged beside those of other layers
            device = next((each.device for each in found.values()), None)
            return torch.zeros(0, device=device)
        if kind == "kv_group":
            return scores.view(self.architecture.layers[layer].num_key_value_heads, -1).sum(1)
        return scores


class ActivationScores(ReaderScores):
    """Scores by an ActivationCriterion, from the forward passes of training."""

    def __init__(
        self,
        name: str,
        kinds: Iterable[str],
        architecture: Architecture,
        decay: float,
        mean_over_ranks: MeanOverRanks = single_rank,
    ) -> None:
        """Raise UsageError if the stem is in the pruning space, because these criteria do not cover it."""
        super().__init__(name, kinds, architecture, decay, mean_over_ranks)
        self.criterion = ACTIVATION_CRITERIA[name]
        self._moments: dict[str, Moments] = {}

    def observe(self, name: str, values: Tensor) -> None:
        moments = Moments.of(values)
        self._moments[name] = self._moments[name] + moments if name in self._moments else moments

    def pop_scores(self) -> dict[str, Tensor]:
        found = {}
        for name, moments in self._moments.items():
            channels = self.criterion.score(moments, full(self.weights[name].detach()).float())
            found[name] = self.sum_channels(name, channels)
        self._moments = {}
        return found

    def discard_step(self) -> None:
        self._moments = {}


class GateScores(ReaderScores):
    """Scores by the Fisher information of gates.

    It keeps the observed values until their backward pass, also under activation checkpointing, which would drop them.
    """

    observes_stem = True

    def __init__(
        self,
        kinds: Iterable[str],
        architecture: Architecture,
        decay: float,
        mean_over_ranks: MeanOverRanks = single_rank,
    ) -> None:
        super().__init__(TOKEN_FISHER, kinds, architecture, decay, mean_over_ranks)
        self._squares: dict[str, Tensor] = {}

    def observe(self, name: str, values: Tensor) -> None:
        if values.requires_grad:
            values.register_hook(self._gradient_hook(name, values.detach()))

    def _gradient_hook(self, name: str, values: Tensor) -> Callable[[Tensor], None]:
        def add_squares(gradient: Tensor) -> None:
            # changes of the loss when a channel is closed at a token, [..., C]
            changes = self.sum_channels(name, gradient.float() * values.float())
            squares = changes.flatten(0, -2).square().sum(0)
            if name in self._squares:
                squares = squares + self._squares[name]
            self._squares[name] = squares

        return add_squares

    def pop_scores(self) -> dict[str, Tensor]:
        squares, self._squares = self._squares, {}
        return squares

    def discard_step(self) -> None:
        self._squares = {}
