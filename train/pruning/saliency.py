"""Saliency of minimal parameter groups from the weights and gradients of the training steps.

Shapes: L layers, H hidden, G key/value heads, R query heads per key/value head, D head_dim, I FFN channels. A
criterion's element-wise terms are summed in fp32 over the parameters of each piece of a group. The sums become the
score of the piece. The score of a group is the sum over its pieces (FOLDS).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..compute.distributed import MeanOverRanks, full, single_rank
from ..model.architecture import Architecture
from ..model.groups import KINDS, counts
from ..model.tensors import axes_of, is_of_attention, split_name
from .criteria import Criterion, Terms
from .running_scores import RunningScores, Scores

Sums = dict[tuple[int | str | None, str], list[Tensor]]
"""{(layer, axis): [sum of term 1 along that axis, ...]}. The hidden axis has one entry per piece of the stem."""


def _stem_piece(layer: int | None, name: str, architecture: Architecture) -> str:
    """Return the piece of a stem channel of a tensor: a layer's attention or FFN, or the final norm."""
    if layer is None:
        return "final norm"
    return f"{layer} attention" if is_of_attention(split_name(name)[1], architecture.parts) else f"{layer} ffn"


def _add(sums: Sums, key: tuple[int | str | None, str], terms: list[Tensor]) -> None:
    before = sums.get(key)
    sums[key] = terms if before is None else [a + b for a, b in zip(before, terms, strict=True)]


def _add_blocks(sums: Sums, name: str, terms: Terms, rows: int) -> None:
    """Add sums over blocks of `rows` tokens of an embedding (or LM head) [V, H], so that pieces have a layer's size."""
    blocks = [[block.sum(0) for block in full(term).split(rows)] for term in terms]
    for index, block in enumerate(zip(*blocks, strict=True)):
        _add(sums, (f"{name} {index}", "hidden"), list(block))


class SaliencyTracker(RunningScores):
    """Scores by an element-wise criterion."""

    def __init__(
        self,
        criterion: Criterion,
        kinds: Iterable[str],
        architecture: Architecture,
        decay: float,
        mean_over_ranks: MeanOverRanks = single_rank,
    ) -> None:
        super().__init__(kinds, architecture, decay, mean_over_ranks)
        self.criterion = criterion
        self.needs_microbatches = criterion.per_microbatch
        self._samples: list[tuple[Sums, float]] = []
        """(sums, weight) of this step's samples so far: one, or one per microbatch."""

    @property
    def axes(self) -> frozenset[str]:
        """Return the axes whose sums the kinds need."""
        return frozenset(axis for name in self.kinds for axis in KINDS[name].scored_axes)

    @torch.no_grad()
    def accumulate(self, named_parameters: Iterable[tuple[str, Tensor]], sample_weight: float = 1.0) -> None:
        """Add the current gradients: once per step, or once per microbatch if the criterion needs samples.

        A sample is the gradient of the mean loss over its tokens, weighted by their number.
        """
        sums: Sums = {}
        for name, parameter in named_parameters:
            layer, axes = axes_of(name, self.architecture)
            wanted = [dim for dim, axis in enumerate(axes) if axis in self.axes]
            gradient = parameter.grad
            if not wanted or (gradient is None and self.criterion.uses_gradient):
                continue
            weight = parameter.detach().float()
            # a criterion without gradients gets the weight in their place, which it does not read
            terms = self.criterion.elementwise(weight, weight if gradient is None else gradient.float())
            for dim in wanted:
                if axes == ("vocab", "hidden"):
                    # not one signed sum over the vocabulary, in which unrelated rows would cancel (see Fold)
                    _add_blocks(sums, name, terms, 3 * self.architecture.hidden_size)
                    continue
                owner = layer if axes[dim] != "hidden" else _stem_piece(layer, name, self.architecture)
                # summed before it is gathered: a rank then receives a vector instead of a matrix
                along_axis = [term.sum(1 - dim) if term.dim() == 2 else term for term in terms]
                _add(sums, (owner, axes[dim]), [full(term) for term in along_axis])
        self._samples.append((sums, sample_weight))

    @torch.no_grad()
    def finish_step(self) -> None:
        """Average the scores of a step over its samples and ranks and into the running scores."""
        # Means over samples and over ranks commute with sums, not with `combine`: a criterion that is not linear in
        # its samples (fisher) combines each one first, all others combine the mean once.
        if self.criterion.combine_each_sample:
            each = [self._group_scores(sums) for sums, _ in self._samples]
            observed = {name: self._means([scores[name] for scores in each]) for name in self.kinds}
            self.mean_over_ranks(vector for vectors in observed.values() for vector in vectors)
        else:
            samples = [sums for sums, _ in self._samples]
            mean = {key: self._means([sums[key] for sums in samples]) for key in samples[0]}
            if self.criterion.per_microbatch:  # otherwise the gradients are averaged over ranks already
                self.mean_over_ranks(term for terms in mean.values() for term in terms)
            observed = self._group_scores(mean)
        self._samples = []
        self._average(observed)

    def discard_step(self) -> None:
        """Forget the samples of a step that is not applied."""
        self._samples = []

    def _means(self, samples: Sequence[list[Tensor]]) -> list[Tensor]:
        """Return the weighted mean over the step's samples of each tensor in their lists."""
        means = []
        for values in zip(*samples, strict=True):
            weighted = [value * weight for value, (_, weight) in zip(values, self._samples, strict=True)]
            means.append(torch.stack(weighted).mean(0))
        return means

    def _group_scores(self, sums: Sums) -> Scores:
        """Fold axis sums into one score per group of each kind, [0] for a layer without such groups."""
        scores: Scores = {}
        device = next((terms[0].device for terms in sums.values()), None)  # running averages are kept on one device
        for name in self.kinds:
            fold = FOLDS[name]
            scores[name] = [
                fold(self.criterion, sums, self.architecture, layer) if count else torch.zeros(0, device=device)
                for layer, count in enumerate(counts(name, self.architecture))
            ]
        return scores


Fold = Callable[[Criterion, Sums, Architecture, int], Tensor]
"""(criterion, axis sums, shape, layer) -> scores of a layer's groups. Scores are formed in pieces of about an FFN
channel's size and added. In one signed sum over a large group, unrelated parts cancel and large groups look cheap
(research/log)."""


def _fold_key_value_groups(criterion: Criterion, sums: Sums, architecture: Architecture, layer: int) -> Tensor:
    """Return [G]: a piece is one of the head's D channels, of key and value and of all R query heads together."""
    groups = architecture.layers[layer].num_key_value_heads
    terms = []
    for queries, keys_values in zip(sums[layer, "query"], sums[layer, "kv"], strict=True):
        of_queries = queries.view(groups, -1, architecture.head_dim).sum(1)  # [G, R, D] -> [G, D]
        terms.append(of_queries + keys_values.view(groups, architecture.head_dim))
    return criterion.combine(*terms).sum(1)


def _fold_query_heads(criterion: Criterion, sums: Sums, architecture: Architecture, layer: int) -> Tensor:
    """Return [G * R]: a piece is one of the head's D channels."""
    heads, head_dim = architecture.layers[layer].num_attention_heads, architecture.head_dim
    channels = [term.view(heads, -1, head_dim).sum(1) for term in sums[layer, "query"]]
    return criterion.combine(*channels).sum(1)


def _fold_ffn_channels(criterion: Criterion, sums: Sums, architecture: Architecture, layer: int) -> Tensor:
    """Return [I]: a channel is one piece."""
    return criterion.combine(*sums[layer, "ffn"])


def _fold_stem_channels(criterion: Criterion, sums: Sums, architecture: Architecture, layer: int) -> Tensor:
    """Return [H]: the pieces are those of `_stem_piece` and `_add_blocks`."""
    pieces = [terms for (_, axis), terms in sums.items() if axis == "hidden"]
    return torch.stack([criterion.combine(*terms) for terms in pieces]).sum(0)


FOLDS: dict[str, Fold] = {
    "kv_group": _fold_key_value_groups,
    "query_head": _fold_query_heads,
    "ffn": _fold_ffn_channels,
    "stem": _fold_stem_channels,
}
"""Fold of each kind of groups.KINDS."""
