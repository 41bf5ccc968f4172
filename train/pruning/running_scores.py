"""Running scores of every prunable group: the common base of all kinds of saliency, and the random one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..compute.distributed import MeanOverRanks, single_rank
from ..model.architecture import Architecture
from ..model.groups import counts

Scores = dict[str, list[Tensor]]
"""{kind: [score vector of layer 0, ...]}, with one vector for a kind of the whole model (see groups.KINDS)."""


def scores_of_kept(vectors: list[Tensor], kept: list[Tensor] | None) -> list[Tensor]:
    """Return the scores of surviving groups. Blocks have no `kept`: every layer keeps their scores."""
    if kept is None:
        return vectors
    return [vector[survivors.to(vector.device)] for vector, survivors in zip(vectors, kept, strict=True)]


class RunningScores:
    """Scores of every prunable group, averaged exponentially over past optimizer steps."""

    needs_microbatches = False
    """Whether `accumulate` needs each microbatch's own gradient."""

    def __init__(
        self,
        kinds: Iterable[str],
        architecture: Architecture,
        decay: float,
        mean_over_ranks: MeanOverRanks = single_rank,
    ) -> None:
        """Start without scores. `decay` is the weight of the past per optimizer step.

        `mean_over_ranks` averages tensors in place if samples are a rank's own microbatches.
        """
        self.kinds = tuple(kinds)
        self.architecture = architecture
        self.decay = decay
        self.mean_over_ranks = mean_over_ranks
        self.num_observations = 0
        self.scores: Scores = {}

    def attach(self, model: Any) -> None:
        """Observe the forward passes of `model` if scores need them, again after it is rebuilt."""

    def detach(self) -> None:
        """Stop observing."""

    def accumulate(self, named_parameters: Iterable[tuple[str, Tensor]], sample_weight: float = 1.0) -> None:
        """Read the current gradients. Call it after backward and before gradients are clipped or cleared.

        `sample_weight` is the weight of this sample in the step, 1 on average.
        """

    def finish_step(self) -> None:
        """Turn the observations of one optimizer step into scores and average them in."""
        raise NotImplementedError

    def discard_step(self) -> None:
        """Discard the observations of a step with non-finite gradients."""

    def _average(self, observed: Scores) -> None:
        """Update the exponential average with bias correction, as for Adam's moments.

        Step i of n has the weight decay^(n-i) (1 - decay) / (1 - decay^n). Early steps thus count alike, and no step
        outweighs a later one.
        """
        self.num_observations += 1
        if not self.scores:  # the share of the first step is 1
            self.scores = observed
            return
        share = (1.0 - self.decay) / (1.0 - self.decay**self.num_observations)
        for name, vectors in observed.items():
            # a checkpoint is loaded to the device of training, which offloaded weights and random scores are not on
            pairs = zip(self.scores[name], vectors, strict=True)
            self.scores[name] = [average.to(new.device).lerp_(new, share) for average, new in pairs]

    def keep(self, architecture: Architecture, kept: dict[str, list[Tensor]]) -> None:
        """Drop the scores of removed groups. `kept[kind][layer]` are the surviving positions."""
        self.architecture = architecture
        for name, vectors in self.scores.items():
            self.scores[name] = scores_of_kept(vectors, kept[name])

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "num_observations": self.num_observations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = state["scores"]
        self.num_observations = state["num_observations"]


class RandomScores(RunningScores):
    """Uniform noise, drawn at every step: the random baseline (`--saliency random`)."""

    def __init__(self, kinds: Iterable[str], architecture: Architecture, decay: float, seed: int) -> None:
        super().__init__(kinds, architecture, decay)
        self.generator = torch.Generator().manual_seed(seed)

    def finish_step(self) -> None:
        observed = {}
        for name in self.kinds:
            lengths = counts(name, self.architecture)
            observed[name] = [torch.rand(length, generator=self.generator) for length in lengths]
        self._average(observed)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"].cpu())
