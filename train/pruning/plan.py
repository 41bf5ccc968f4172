"""Settled pruning of a run: groups, rules and budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...runtime.base.errors import UsageError
from ..compute.ranks import MeanOverRanks
from ..model.architecture import Architecture
from ..model.file_types import irregular_gguf
from ..vocabulary.frequency import with_parts
from ..vocabulary.pieces import Pieces
from .budget import Budget, check_budget, device_time, make_budget, read_architecture
from .config import PruneConfig
from .groups import KINDS
from .measures import PARAMETERS, DeviceTime, Measure
from .running_scores import RunningScores
from .selection import SelectionRules, check_floor
from .trackers import tracker_named


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

    def tracker(self, architecture: Architecture, seed: int, mean_over_ranks: MeanOverRanks) -> RunningScores:
        """Return an empty tracker of the groups' saliency for a model of this shape; see trackers.tracker_named."""
        settings = self.settings
        kinds = tuple(name for name in self.rules.kinds if KINDS[name].scored_axes)
        return tracker_named(settings.saliency, kinds, architecture, settings.saliency_decay, seed, mean_over_ranks)


def make_pruning_plan(
    settings: PruneConfig, source: Architecture, vocabulary_bytes: int, pieces: Pieces | None = None
) -> PruningPlan | None:
    """Return the plan for a source of this shape; None without pruning.

    `vocabulary_bytes` is the bytes of the tokenizer in an exported file, `pieces` its tokens if rows may be removed.
    Raises UsageError if the target is out of reach.
    """
    path = settings.target_architecture
    floor = read_architecture(Path(path)) if path is not None else None
    time = device_time(settings, settings.device_profile)
    budget = make_budget(settings, source, floor, vocabulary_bytes, time)
    if budget is None:
        return None
    _check_family(settings, source)
    uniform = settings.layout == "uniform"
    # an explicit shape is reached channel by channel, whatever its widths are multiples of
    multiple = settings.width_multiple if floor is None else 1
    fixed_rows = len(with_parts(pieces, pieces.fixed)) if pieces is not None else 0
    measures = budget.measure, _price(settings)
    rules = SelectionRules(settings.kinds, multiple, uniform, floor, settings.blocks, *measures, fixed_rows)
    if rules.price is not None:
        rules.price.of(source)  # UsageError now, where it is another's heads that were measured
    if floor is not None:
        check_floor(source, floor)
    if uniform and not source.is_uniform:
        raise UsageError("--layout uniform needs a source whose layers are equal")
    check_budget(budget, source, rules)
    return PruningPlan(settings, source, rules, budget, time, pieces)


def _price(settings: PruneConfig) -> Measure | None:
    """Return the cost in the ranking if it differs from the budget's measure."""
    if settings.rank_by == "parameters":
        return PARAMETERS
    other = device_time(settings, settings.ranking_profile)
    return other.measure if other is not None else None


def _check_family(settings: PruneConfig, source: Architecture) -> None:
    """Raise UsageError for settings that the source's family does not support."""
    parts = source.parts
    if settings.recover != "none" and (parts.is_parallel or "after_attention" in parts.norms):
        raise UsageError(
            f"--recover {settings.recover} fits matrices that add to the residual stream one after the other; those of "
            f"{source.family} do not: leave it out"
        )
    if settings.target_bytes is not None and settings.layout == "per-layer" and not irregular_gguf(source):
        raise UsageError(
            "--target-bytes counts a GGUF's, and llama.cpp has no architecture for irregular layers of "
            f"{source.family}: they are zero-padded; add --layout uniform, or use --target-params"
        )
