"""Resolve the pruning of a run: its groups, rules, budget, schedule and the tracker of `--saliency`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..compute.distributed import MeanOverRanks, single_rank
from ..config.pruning import PruneConfig
from ..model.architecture import Architecture
from ..model.groups import KINDS
from ..vocabulary.frequency import with_parts
from ..vocabulary.pieces import Pieces
from .activation import ActivationScores, GateScores
from .budget import Budget, check_budget, device_time, make_budget, make_rules, read_architecture
from .criteria import RANDOM, TOKEN_FISHER, ActivationCriterion, criterion_named
from .measures import DeviceTime
from .rules import SelectionRules
from .running_scores import RandomScores, RunningScores
from .saliency import SaliencyTracker


def make_tracker(
    name: str,
    kinds: Iterable[str],
    architecture: Architecture,
    decay: float,
    seed: int = 0,
    mean_over_ranks: MeanOverRanks = single_rank,
) -> RunningScores:
    """Return the tracker of `--saliency name`. Raises UsageError if there is none."""
    if name == RANDOM:
        return RandomScores(kinds, architecture, decay, seed)
    if name == TOKEN_FISHER:
        return GateScores(kinds, architecture, decay, mean_over_ranks)
    criterion = criterion_named(name)
    if isinstance(criterion, ActivationCriterion):
        return ActivationScores(name, criterion, kinds, architecture, decay, mean_over_ranks)
    return SaliencyTracker(criterion, kinds, architecture, decay, mean_over_ranks)


@dataclass(frozen=True)
class DroppingSchedule:
    """Continuous parameter dropping (EfficientLLM, figure 2c), or dropping in equal steps.

    The budget's measure (parameters, bytes of the exported file or milliseconds) falls linearly in tokens.
    """

    source: float
    target: float
    start_tokens: int
    """Tokens before the first removal, so that saliency is an average."""
    end_tokens: int
    """Tokens at which the target is reached."""
    removals: int = 0
    """Number of equal steps, the first at the start and the last at the end. 0: continuous."""
    sizes: tuple[float, ...] = ()
    """Larger sizes to reach on the way, largest first. Each ends a step. The steps between two are equal."""

    def target_at(self, tokens: int) -> float:
        """Return the largest allowed size after `tokens`."""
        if tokens >= self.end_tokens:
            return self.target
        if tokens < self.start_tokens:
            return self.source
        share = (tokens - self.start_tokens) / (self.end_tokens - self.start_tokens)
        if not self.removals:
            return self.source + share * (self.target - self.source)
        levels = self._levels()
        # share 0 gives the first level and only share 1 the last: the first removal is at the start, not a step later
        return levels[math.floor(share * (len(levels) - 1))]

    def _levels(self) -> list[float]:
        """Return the sizes after each step."""
        levels = []
        for larger, smaller in itertools.pairwise((self.source, *self.sizes, self.target)):
            share = (larger - smaller) / (self.source - self.target)
            number = max(1, round(self.removals * share))
            levels += [larger + index / number * (smaller - larger) for index in range(1, number)]
            levels.append(smaller)  # exactly the size that was asked for, which the formula could miss by rounding
        return levels


@dataclass(frozen=True)
class PruningPlan:
    """The settings with everything that follows from them and the source."""

    settings: PruneConfig
    source: Architecture
    rules: SelectionRules
    budget: Budget
    time: DeviceTime | None = None
    """Device and workload of --target-latency."""
    pieces: Pieces | None = None
    """Tokens of the source, if rows may be removed."""
    sizes: Mapping[str, float] = field(default_factory=dict)
    """Larger sizes of the run in the budget's measure, by their text in --sizes, largest first."""

    def tracker(self, architecture: Architecture, seed: int, mean_over_ranks: MeanOverRanks) -> RunningScores:
        """Return an empty tracker of the groups' saliency for a model of this shape."""
        settings = self.settings
        kinds = tuple(name for name in self.rules.kinds if KINDS[name].scored_axes)
        return make_tracker(settings.saliency, kinds, architecture, settings.saliency_decay, seed, mean_over_ranks)

    def schedule(self, tokens: int) -> DroppingSchedule:
        """Return the fall of the budget's measure in a run of `tokens`."""
        settings, source = self.settings, self.source
        start = round(settings.prune_start * tokens)
        end = round(settings.prune_end * tokens)
        if settings.vocabulary_rows is not None:  # these are removed before the schedule starts
            source = replace(source, vocab_size=min(settings.vocabulary_rows, source.vocab_size))
        size = self.budget.measure.of(source)
        sizes = tuple(amount for amount in self.sizes.values() if amount < size)
        return DroppingSchedule(size, self.budget.target, start, end, settings.removals, sizes)


def make_pruning_plan(
    settings: PruneConfig, source: Architecture, vocabulary_bytes: int, pieces: Pieces | None = None
) -> PruningPlan | None:
    """Return the plan for a source of this shape, or None without pruning.

    `vocabulary_bytes` is the bytes of the tokenizer in an exported file, `pieces` its tokens if rows may be removed.
    Raises UsageError if the target is out of reach.
    """
    sizes, settings = settings.sizes[:-1], settings.of_smallest_size
    path = settings.target_architecture
    floor = read_architecture(Path(path)) if path is not None else None
    time = device_time(settings, settings.device_profile)
    budget = make_budget(settings, source, floor, vocabulary_bytes, time)
    if budget is None:
        return None
    budgets = {text: make_budget(settings.of_size(text), source, None, vocabulary_bytes, time) for text in sizes}
    larger = {text: each for text, each in budgets.items() if each is not None}
    # a token that must stay is written with its parts, so these must stay as well
    fixed_rows = len(with_parts(pieces, pieces.fixed)) if pieces is not None else 0
    rules = make_rules(settings, source, budget, floor, fixed_rows)
    for each in (*larger.values(), budget):
        check_budget(each, source, rules)
    amounts = {text: each.target for text, each in larger.items()}
    return PruningPlan(settings, source, rules, budget, time, pieces, amounts)
