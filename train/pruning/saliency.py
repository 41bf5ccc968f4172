"""Saliency of minimal parameter groups, from the weights and the gradients of the training steps themselves.

Shapes: L layers, H hidden, G key/value heads, R query heads per key/value head, D head_dim, I FFN channels.
A criterion gives each parameter one or more elementwise terms; terms are summed in fp32 over every parameter of a
group; the sums become one score per group. Scores are averaged exponentially over optimizer steps.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.base.errors import UsageError
from ..compute.gather import full
from ..model.architecture import Architecture
from ..model.tensors import axes_of

GROUP_KINDS = ("kv_group", "query_head", "ffn", "stem")
"""kv_group: one key/value head and its query heads. query_head: one query head (removed from every key/value head of a
layer at once). ffn: one intermediate channel. stem: one hidden channel of the whole model."""

Terms = tuple[Tensor, ...]
Scores = dict[str, list[Tensor]]
"""{kind: [score vector of layer 0, ...]}; 'stem' has one vector. Lengths: kv_group G, query_head G*R, ffn I, stem H."""

Sums = dict[tuple[int | str | None, str], list[Tensor]]
"""{(layer, axis): [sum of term 1 along that axis, ...]}; the hidden axis has one entry per piece of the stem."""


@dataclass(frozen=True)
class Criterion:
    """One way to score groups."""

    elementwise: Callable[[Tensor, Tensor], Terms]
    """(weight, gradient) -> terms of the same shape, summed over a group's parameters."""
    combine: Callable[..., Tensor]
    """(sum of term 1, sum of term 2, ...) -> scores, elementwise over channels."""
    uses_gradient: bool = True
    per_microbatch: bool = False
    """Whether the terms must see each microbatch's own gradient (samples of the empirical Fisher)."""
    combine_each_sample: bool = False
    """Whether `combine` is applied to every sample and its results averaged, not to the averaged sums."""


CRITERIA: dict[str, Criterion] = {
    # |sum g w|: first-order change of the loss (Molchanov et al. 2019, arXiv 1906.10771, eq. 8 before squaring).
    "taylor1": Criterion(lambda w, g: (g * w,), lambda first: first.abs()),
    # |sum (g w - F w^2 / 2)| with the empirical Fisher diagonal F = E_microbatch[g^2] (LLM-Pruner, arXiv 2305.11627).
    "taylor2": Criterion(
        lambda w, g: (g * w, (g * w).square()), lambda first, second: (first - 0.5 * second).abs(), per_microbatch=True
    ),
    # E_microbatch[(sum g w)^2]: the second-order change for removing the whole channel, with the empirical Fisher for
    # the Hessian, cross terms within the channel included (Molchanov et al. 2019, eq. 8).
    "fisher": Criterion(
        lambda w, g: (g * w,), lambda first: first.square(), per_microbatch=True, combine_each_sample=True
    ),
    # sum w^2.
    "magnitude": Criterion(lambda w, g: (w.square(),), lambda squares: squares, uses_gradient=False),
    # Uniform noise, drawn anew on every observation: the baseline that knows nothing.
    "random": Criterion(lambda w, g: (), lambda: torch.empty(0), uses_gradient=False),
}


def register_criterion(name: str, criterion: Criterion) -> None:
    """Make `criterion` available as `--saliency name`."""
    CRITERIA[name] = criterion


ENTRY_POINT_GROUP = "efficientllm.criteria"
"""Installed packages add criteria here: name = "module:criterion"."""


def criterion_named(name: str) -> Criterion:
    """A criterion of the registry or of an installed plug-in; UsageError lists the known ones."""
    for plugin in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=name):
        register_criterion(name, plugin.load())
    if name not in CRITERIA:
        raise UsageError(f"--saliency {name}: unknown; known: {', '.join(CRITERIA)}")
    return CRITERIA[name]


def _stem_piece(layer: int | None, name: str) -> str:
    """The part of a stem channel that a tensor belongs to: a layer's attention or FFN, or the final norm."""
    if layer is None:
        return "final norm"
    return f"{layer} attention" if ".self_attn." in name or ".input_layernorm." in name else f"{layer} ffn"


def _add(sums: Sums, key: tuple[int | str | None, str], terms: list[Tensor]) -> None:
    held = sums.get(key)
    sums[key] = terms if held is None else [a + b for a, b in zip(held, terms, strict=True)]


def _add_blocks(sums: Sums, name: str, terms: Terms, rows: int) -> None:
    """Sums over blocks of `rows` tokens of an embedding (or LM head) [V, H]: pieces as large as a layer's."""
    blocks = [[block.sum(0) for block in full(term).split(rows)] for term in terms]
    for index, block in enumerate(zip(*blocks, strict=True)):
        _add(sums, (f"{name} {index}", "hidden"), list(block))


class SaliencyTracker:
    """Scores of every prunable group of a model, averaged over the training steps seen so far."""

    def __init__(
        self,
        criterion: Criterion,
        kinds: Iterable[str],
        architecture: Architecture,
        decay: float,
        seed: int = 0,
        mean_over_ranks: Callable[[Iterable[Tensor]], None] = lambda tensors: None,
    ) -> None:
        """`decay` is the weight of the past in the exponential average, per optimizer step.

        `mean_over_ranks` averages tensors in place; it is called where the samples are a rank's own microbatches.
        """
        self.mean_over_ranks = mean_over_ranks
        self.criterion = criterion
        self.kinds = tuple(kinds)
        self.decay = decay
        self.architecture = architecture
        self.num_observations = 0
        self.scores: Scores = {}
        self.generator = torch.Generator().manual_seed(seed)
        self._samples: list[Sums] = []
        """Sums of this step's samples so far: one, or one per microbatch."""

    @property
    def axes(self) -> frozenset[str]:
        """Axes whose sums the kinds need."""
        needs = {"kv_group": ("kv", "query"), "query_head": ("query",), "ffn": ("ffn",), "stem": ("hidden",)}
        return frozenset(axis for kind in self.kinds for axis in needs[kind])

    @torch.no_grad()
    def accumulate(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Add the gradients at hand: once per step, or once per microbatch where the criterion asks for samples.

        Call after backward and before gradients are clipped or cleared.
        """
        if self.criterion is CRITERIA["random"]:
            return
        sums: Sums = {}
        for name, parameter in named_parameters:
            layer, axes = axes_of(name)
            wanted = [dim for dim, axis in enumerate(axes) if axis in self.axes]
            gradient = parameter.grad
            if not wanted or (gradient is None and self.criterion.uses_gradient):
                continue
            weight = parameter.detach().float()
            terms = self.criterion.elementwise(weight, weight if gradient is None else gradient.float())
            for dim in wanted:
                if axes == ("vocab", "hidden"):
                    _add_blocks(sums, name, terms, 3 * self.architecture.hidden_size)
                    continue
                owner = layer if axes[dim] != "hidden" else _stem_piece(layer, name)
                _add(sums, (owner, axes[dim]), [full(term.sum(1 - dim) if term.dim() == 2 else term) for term in terms])
        self._samples.append(sums)

    @torch.no_grad()
    def finish_step(self) -> None:
        """Turn the samples of one optimizer step into scores and average them in."""
        if self.criterion is CRITERIA["random"]:
            observed = self._random_scores()
        elif self.criterion.combine_each_sample:
            each = [self._group_scores(sums) for sums in self._samples]
            observed = {
                kind: [torch.stack(vectors).mean(0) for vectors in zip(*(scores[kind] for scores in each), strict=True)]
                for kind in self.kinds
            }
            self.mean_over_ranks(vector for vectors in observed.values() for vector in vectors)
        else:
            mean = {
                key: [torch.stack(terms).mean(0) for terms in zip(*(sums[key] for sums in self._samples), strict=True)]
                for key in self._samples[0]
            }
            if self.criterion.per_microbatch:
                self.mean_over_ranks(term for terms in mean.values() for term in terms)
            observed = self._group_scores(mean)
        self._samples = []
        self._average(observed)

    def discard_step(self) -> None:
        """Forget the sums of a step whose gradients were not finite."""
        self._samples = []

    def _group_scores(self, sums: Sums) -> Scores:
        """Fold axis sums into one score per group of each kind."""
        head_dim = self.architecture.head_dim
        scores: Scores = {kind: [] for kind in self.kinds}
        for kind in self.kinds:
            if kind == "stem":
                pieces = [self.criterion.combine(*terms) for (_, axis), terms in sums.items() if axis == "hidden"]
                scores[kind].append(torch.stack(pieces).sum(0))
                continue
            for index, shape in enumerate(self.architecture.layers):
                if (shape.intermediate_size if kind == "ffn" else shape.num_attention_heads) == 0:
                    scores[kind].append(torch.zeros(0))
                    continue
                if kind == "ffn":
                    scores[kind].append(self.criterion.combine(*sums[index, "ffn"]))
                    continue
                groups = shape.num_key_value_heads if kind == "kv_group" else shape.num_attention_heads
                channels = [term.view(groups, -1, head_dim).sum(1) for term in sums[index, "query"]]
                if kind == "kv_group":
                    keys_values = [term.view(groups, head_dim) for term in sums[index, "kv"]]
                    channels = [q + kv for q, kv in zip(channels, keys_values, strict=True)]
                scores[kind].append(self.criterion.combine(*channels).sum(1))  # [groups, D] -> [groups]
        return scores

    def _random_scores(self) -> Scores:
        def draw(length: int) -> Tensor:
            return torch.rand(length, generator=self.generator)

        lengths = {
            "kv_group": [layer.num_key_value_heads for layer in self.architecture.layers],
            "query_head": [layer.num_attention_heads for layer in self.architecture.layers],
            "ffn": [layer.intermediate_size for layer in self.architecture.layers],
            "stem": [self.architecture.hidden_size],
        }
        return {kind: [draw(length) for length in lengths[kind]] for kind in self.kinds}

    def _average(self, observed: Scores) -> None:
        self.num_observations += 1
        if not self.scores:
            self.scores = observed
            return
        for kind, vectors in observed.items():
            for held, new in zip(self.scores[kind], vectors, strict=True):
                held.lerp_(new, 1.0 - self.decay)

    def keep(self, architecture: Architecture, kept: dict[str, list[Tensor]]) -> None:
        """Drop the scores of removed groups; `kept[kind][layer]` are the surviving positions."""
        self.architecture = architecture
        for kind, vectors in self.scores.items():
            self.scores[kind] = [
                vector[survivors.to(vector.device)] for vector, survivors in zip(vectors, kept[kind], strict=True)
            ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "scores": self.scores,
            "num_observations": self.num_observations,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = state["scores"]
        self.num_observations = state["num_observations"]
        self.generator.set_state(state["generator"])
