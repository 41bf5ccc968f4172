"""Resolve the target size of a run and the rules that follow from it. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...runtime.base.errors import UsageError
from ...runtime.latency.profile import DeviceProfile
from ..config.pruning import LatencyTarget, PruneConfig, SizeConfig
from ..model.architecture import Architecture
from ..model.file_types import irregular_gguf
from .measures import PARAMETERS, DeviceTime, Measure, bytes_of_file
from .rules import SelectionRules, check_floor, fastest_small_architecture

DEFAULT_TYPE = "q8_0"
"""Type of --target-bytes if neither --quantize nor --qat gives one."""


@dataclass(frozen=True)
class Budget:
    """A target and the measure of an architecture."""

    target: float
    measure: Measure

    def describe(self) -> str:
        """Return the target in words."""
        return self.measure.describe(self.target)

    def is_met(self, architecture: Architecture) -> bool:
        """Return True if a shape is within the target."""
        return self.measure.of(architecture) <= self.target


def read_architecture(path: Path) -> Architecture:
    """Read an architecture file: Architecture.to_dict as JSON, or the `final` of a run's architecture.json."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--target-architecture {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"--target-architecture {path}: not valid JSON: {error}") from error
    return Architecture.from_dict(value.get("final", value))


def make_budget(
    settings: SizeConfig,
    source: Architecture,
    floor: Architecture | None,
    vocabulary_bytes: int,
    time: DeviceTime | None = None,
) -> Budget | None:
    """Return the budget of the settings, or None without pruning.

    `floor` is the explicit target architecture, `vocabulary_bytes` the bytes of the tokenizer in an exported file,
    `time` the result of `device_time`.
    """
    if floor is not None:
        return Budget(floor.num_parameters, PARAMETERS)
    if settings.target_latency is not None and time is not None:
        measure = time.measure
        target = LatencyTarget.parse(settings.target_latency)
        return Budget(target.of(measure.of(source)), measure)
    if settings.target_bytes is not None:
        kind = settings.quantize or DEFAULT_TYPE
        measure = bytes_of_file(kind, vocabulary_bytes, source.vocab_size, settings.output_type)
        return Budget(settings.target_bytes, measure)
    if settings.target_params is not None:
        return Budget(settings.target_params, PARAMETERS)
    if settings.target_ratio is not None:
        return Budget(round(settings.target_ratio * source.num_parameters), PARAMETERS)
    return None


def device_time(settings: SizeConfig, profile: str | None) -> DeviceTime | None:
    """Return the device and workload of --target-latency, or None without one.

    Raises UsageError if they cannot be read.
    """
    workload = settings.asked_workload
    if profile is None or workload is None:
        return None
    return DeviceTime(DeviceProfile.load(Path(profile)), workload)


def check_budget(budget: Budget, source: Architecture, rules: SelectionRules, is_whole: bool = True) -> None:
    """Raise UsageError if the target is above the source's size or below the smallest possible one.

    Without `is_whole`, the measure lacks the bytes of the tokenizer, and only the smallest size is compared.
    """
    measure = budget.measure
    if is_whole and budget.target > measure.of(source):
        raise UsageError(
            f"the target of {measure.show(budget.target)} is larger than the source's "
            f"{measure.show(measure.of(source))}; choose a smaller one"
        )
    least = measure.of(fastest_small_architecture(source, rules))
    if budget.target < least:
        remedy = "give fewer --stem-channels" if rules.fixed_stem else "prune more group types"
        raise UsageError(
            f"the target of {measure.show(budget.target)} is too small: one group per layer already takes "
            f"{measure.show(least)}{'' if is_whole else ' without the tokenizer'} in this pruning space; raise the "
            f"target or {remedy}"
        )


def check_smallest_size(settings: PruneConfig, source: Architecture) -> None:
    """Raise UsageError for a target that a source of this shape cannot reach, whatever its tokenizer."""
    settings = settings.of_smallest_size
    budget = make_budget(settings, source, None, 0, device_time(settings, settings.device_profile))
    if budget is not None:
        rules = make_rules(settings, source, budget, None)
        check_budget(budget, source, rules, is_whole=budget.measure.unit != "bytes")


def make_rules(
    settings: PruneConfig, source: Architecture, budget: Budget, floor: Architecture | None, fixed_rows: int = 0
) -> SelectionRules:
    """Return the rules of removal. Raises UsageError for settings that the source does not support.

    `floor` is the explicit target architecture, `fixed_rows` the number of vocabulary rows that must stay.
    """
    _check_family(settings, source)
    uniform, cost = settings.layout == "uniform", _cost(settings)
    if cost is not None:
        cost.of(source)  # UsageError now, where it is another's heads that were measured
    if floor is not None:
        check_floor(source, floor)
    if uniform and not source.is_uniform:
        raise UsageError("--layout uniform needs a source whose layers are equal")
    # an explicit shape is reached channel by channel, whatever its widths are multiples of
    multiple = settings.width_multiple if floor is None else 1
    fixed_rows = max(fixed_rows, settings.vocabulary_rows or 0)
    stem = settings.stem_channels or 0
    if stem > source.hidden_size:
        raise UsageError(f"--stem-channels {stem}: the source has {source.hidden_size}; give fewer, or omit it")
    return SelectionRules(
        settings.kinds, multiple, uniform, floor, settings.blocks, budget.measure, cost, fixed_rows, stem
    )


def _cost(settings: SizeConfig) -> Measure | None:
    """Return the measure of the ranking if it differs from the budget's measure."""
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
            f"{source.family} do not; omit it"
        )
    if settings.target_bytes is not None and settings.layout == "per-layer" and not irregular_gguf(source):
        raise UsageError(
            "--target-bytes counts the bytes of a GGUF, and llama.cpp has no architecture for irregular layers of "
            f"{source.family}, which are zero-padded; add --layout uniform, or use --target-params"
        )
