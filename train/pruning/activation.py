"""Saliency of heads and FFN channels from the inputs of o_proj and down_proj (`--saliency NAME`).

Shapes: C input channels of a matrix (query heads times D, or FFN channels), H its outputs. A head's score is the sum
over its channels, a key/value group's that of its query heads. The formulas from activations are in criteria.py.

token-fisher is the Fisher information of a gate before a group. Let x_tc be the input of channel c at token t, and g_tc
the gradient of the loss there. Closing a gate on a head (its D channels together) or on an FFN channel changes the loss
by about 1/2 sum_t (sum_c g_tc x_tc)^2 (Fisher pruning: Theis et al. 2018, arXiv 1801.05787, eq. 7, with every token as
a sample). `fisher` forms the same square over a whole microbatch, of which a step has few. The tokens of a step are
hundreds of samples, so this ranking has much less noise: a one-shot removal with a fit ends at 0.41 nats instead of
0.49 (research/log). A stem channel has a gate after every norm that reads it. Its score is the square of the sum of
their roots.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...runtime.base.errors import UsageError
from ..compute.distributed import MeanOverRanks, full, single_rank
from ..model.architecture import Architecture
from ..model.groups import counts
from ..model.tensors import is_stem_norm
from .criteria import TOKEN_FISHER, ActivationCriterion, Moments
from .running_scores import RunningScores

READERS = ("self_attn.o_proj", "mlp.down_proj")
"""Matrices whose input channels belong to heads and to the FFN."""


class ReaderScores(RunningScores):
    """Observer of the inputs of every matrix of READERS in training, with one score per FFN channel and query head."""

    name = TOKEN_FISHER
    """Value of --saliency."""
    observes_stem = False
    """Whether the outputs of the stem's norms are observed as well."""

    def __init__(
        self,
        kinds: Iterable[str],
        architecture: Architecture,
        decay: float,
        mean_over_ranks: MeanOverRanks = single_rank,
    ) -> None:
        """Raise UsageError if the stem is in the pruning space and not observed."""
        super().__init__(kinds, architecture, decay, mean_over_ranks)
        if "stem" in self.kinds and not self.observes_stem:
            raise UsageError(f"--saliency {self.name} ranks attention and ffn only; remove stem from --prune")
        if "stem" in self.kinds and not {"before_attention", "before_ffn"} >= architecture.parts.norms.keys():
            raise UsageError(
                f"--saliency {self.name} observes the stem before each block, and {architecture.family} has norms "
                "after its blocks; remove stem from --prune, or use --saliency taylor1"
            )
        self._handles: list[RemovableHandle] = []
        self.detach()

    def observe(self, name: str, module: Any) -> RemovableHandle:
        """Add a hook that observes the training passes of the named module, and return its handle.

        Evaluations and measurements of block prices run the same module in eval mode and must not count.
        """
        raise NotImplementedError

    def pop_scores(self) -> dict[str, Tensor]:
        """Return and discard the scores since the last call: {module: [FFN channels, heads or stem channels]}."""
        raise NotImplementedError

    def attach(self, model: Any) -> None:
        """Observe every reader of a model, and no other model any longer."""
        self.detach()
        for name, module in model.named_modules():
            is_norm = "stem" in self.kinds and self._is_stem_norm(name) and not isinstance(module, nn.Identity)
            if name.endswith(READERS) or is_norm:
                self._handles.append(self.observe(name, module))

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _is_stem_norm(self, module: str) -> bool:
        return is_stem_norm(f"{module}.weight", self.architecture)

    @torch.no_grad()
    def finish_step(self) -> None:
        """Average the scores of a step over ranks and into the running scores."""
        found = self.pop_scores()
        self.mean_over_ranks(found.values())
        observed = {}
        for kind in self.kinds:
            layers = range(len(counts(kind, self.architecture)))
            observed[kind] = [self._scores(kind, layer, found) for layer in layers]
        self._average(observed)

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
        criterion: ActivationCriterion,
        kinds: Iterable[str],
        architecture: Architecture,
        decay: float,
        mean_over_ranks: MeanOverRanks = single_rank,
    ) -> None:
        """Raise UsageError if the stem is in the pruning space, because these criteria do not cover it."""
        self.name = name
        super().__init__(kinds, architecture, decay, mean_over_ranks)
        self.criterion = criterion
        self._moments: dict[str, Moments] = {}
        self._weights: dict[str, Any] = {}
        """Weight [H, C] of every observed matrix."""

    def observe(self, name: str, module: Any) -> RemovableHandle:
        """Add up the moments of a matrix's inputs in training passes."""
        self._weights[name] = module.weight

        def add_moments(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if module.training:
                moments = Moments.of(arguments[0])
                self._moments[name] = self._moments[name] + moments if name in self._moments else moments

        return module.register_forward_pre_hook(add_moments)

    def pop_scores(self) -> dict[str, Tensor]:
        """Return the criterion's scores since the last call: {module: [channels or heads]}."""
        found = {}
        for name, moments in self._moments.items():
            channels = self.criterion.score(moments, full(self._weights[name].detach()).float())
            found[name] = channels
            if name.endswith(READERS[0]):  # [heads * D] -> [heads]
                found[name] = channels.unflatten(-1, (-1, self.architecture.head_dim)).sum(-1)
        self._moments = {}
        return found

    def discard_step(self) -> None:
        """Forget the moments of a step that is not applied."""
        self._moments = {}


class _Gates(torch.autograd.Function):
    """Identity of values [..., C], whose gates [groups] get the sums of their squares as a gradient.

    The sums are a gradient, and not kept by a hook, so that torch.compile traces them with the layer.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, gates: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        ctx.num_gates = len(gates)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the gradient of values, and for each gate the sum over tokens of (gradient * values)^2 [groups].

        The product is the first-order change of the loss when the gate is closed at a token.
        """
        # changes of the loss when a gate is closed at a token, [..., groups]
        changes = gradient.float() * ctx.saved_tensors[0].float()
        if changes.shape[-1] != ctx.num_gates:  # a head's gate closes D channels
            changes = changes.unflatten(-1, (ctx.num_gates, -1)).sum(-1)
        return gradient, changes.flatten(0, -2).square().sum(0)


def _behind_gates(values: Tensor, module: Any) -> Tensor:
    """Return the same values, observed by the module's gates. Offloaded gates lie in host memory."""
    return _Gates.apply(values, module.gates.to(values.device)) if module.training else values


# of all layers alike, without names, as compiled layers of the same shape share their code
def _gate_inputs(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (_behind_gates(arguments[0], module), *arguments[1:])


def _gate_output(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return _behind_gates(output, module)


class GateScores(ReaderScores):
    """Scores by the Fisher information of gates."""

    observes_stem = True
    gates: dict[str, Tensor]
    """Gates of every observed module. Their gradient is the scores of the step so far."""

    def observe(self, name: str, module: Any) -> RemovableHandle:
        """Multiply the values of a module by gates whose gradients are its scores."""
        channels = module.weight.shape[-1]  # [H, C] of a matrix, [H] of a norm
        count = channels // self.architecture.head_dim if name.endswith(READERS[0]) else channels
        # no parameter: neither the optimizer nor other ranks know it
        module.gates = self.gates[name] = torch.zeros(count, device=module.weight.device, requires_grad=True)
        if name.endswith(READERS):
            return module.register_forward_pre_hook(_gate_inputs)
        return module.register_forward_hook(_gate_output)

    def detach(self) -> None:
        super().detach()
        self.gates = {}

    def pop_scores(self) -> dict[str, Tensor]:
        """Return the gradients of the gates since the last call: {module: [groups]}."""
        # in the order of the backward pass
        found = {name: gates.grad for name, gates in reversed(self.gates.items()) if gates.grad is not None}
        self.discard_step()
        return found

    def discard_step(self) -> None:
        """Forget the gradients of a step that is not applied."""
        for gates in self.gates.values():
            gates.grad = None
