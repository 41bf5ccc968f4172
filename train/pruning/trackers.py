"""Trackers of `--saliency NAME`: by gradients, activations, or noise."""

from __future__ import annotations

from collections.abc import Iterable

from ..compute.ranks import MeanOverRanks, alone
from ..model.architecture import Architecture
from .activation import ACTIVATION_CRITERIA, ActivationScores
from .criteria import RANDOM, TOKEN_FISHER, criterion_named
from .gates import GateScores
from .running_scores import RandomScores, RunningScores
from .saliency import SaliencyTracker


def tracker_named(
    name: str,
    kinds: Iterable[str],
    architecture: Architecture,
    decay: float,
    seed: int = 0,
    mean_over_ranks: MeanOverRanks = alone,
) -> RunningScores:
    """Return the tracker of `--saliency name`. Raises UsageError if there is none."""
    if name == RANDOM:
        return RandomScores(kinds, architecture, decay, seed)
    if name == TOKEN_FISHER:
        return GateScores(kinds, architecture, decay, mean_over_ranks)
    if name in ACTIVATION_CRITERIA:
        return ActivationScores(name, kinds, architecture, decay, mean_over_ranks)
    return SaliencyTracker(criterion_named(name), kinds, architecture, decay, mean_over_ranks)
