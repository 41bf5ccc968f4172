"""Target of a run: parameters, bytes of an exported file, milliseconds on a device, or an explicit architecture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...runtime.base.errors import UsageError
from ...runtime.latency.profile import DeviceProfile
from ..model.architecture import Architecture
from .config import PruneConfig
from .latency_target import LatencyTarget
from .measures import PARAMETERS, DeviceTime, Measure, bytes_of_file
from .selection import SelectionRules, fastest_of_the_smallest

DEFAULT_TYPE = "q8_0"
"""Type of --target-bytes if neither --quantize nor --qat says."""


@dataclass(frozen=True)
class Budget:
    """A target and the measure of an architecture."""

    target: float
    measure: Measure

    def describe(self) -> str:
        """Return the target in words."""
        return self.measure.describe(self.target)

    def is_met(self, architecture: Architecture) -> bool:
        return self.measure.of(architecture) <= self.target


def read_architecture(path: Path, flag: str = "--target-architecture") -> Architecture:
    """Read an architecture file: Architecture.to_dict as JSON, or the `final` of a run's architecture.json."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{flag} {path}: not valid JSON: {error}") from error
    return Architecture.from_dict(value.get("final", value))


def make_budget(
    settings: PruneConfig,
    source: Architecture,
    floor: Architecture | None,
    vocabulary_bytes: int,
    time: DeviceTime | None = None,
) -> Budget | None:
    """Return the budget of the settings; None without pruning.

    `floor` is the explicit target architecture, `vocabulary_bytes` the bytes of the tokenizer in an exported file,
    `time` the result of `device_time`.
    """
    if floor is not None:
        return Budget(floor.num_parameters, PARAMETERS)
    if settings.target_latency is not None and time is not None:
        measure = time.measure
        return Budget(LatencyTarget.parse(settings.target_latency).of(measure.of(source)), measure)
    if settings.target_bytes is not None:
        kind = settings.quantize or DEFAULT_TYPE
        measure = bytes_of_file(kind, vocabulary_bytes, source.vocab_size, settings.output_type)
        return Budget(settings.target_bytes, measure)
    if settings.target_params is not None:
        return Budget(settings.target_params, PARAMETERS)
    if settings.target_ratio is not None:
        return Budget(round(settings.target_ratio * source.num_parameters), PARAMETERS)
    return None


def device_time(settings: PruneConfig, profile: str | None) -> DeviceTime | None:
    """Return the device and workload of --target-latency; None without one.

    Raises UsageError if they cannot be read.
    """
    workload = settings.asked_workload
    if profile is None or workload is None:
        return None
    return DeviceTime(DeviceProfile.load(Path(profile)), workload)


def check_budget(budget: Budget, source: Architecture, rules: SelectionRules) -> None:
    """Raise UsageError if the target is above the source's size or below the smallest possible one."""
    measure = budget.measure
    if budget.target > measure.of(source):
        raise UsageError(
            f"the target of {measure.show(budget.target)} is larger than the source's "
            f"{measure.show(measure.of(source))}; choose a smaller one"
        )
    least = measure.of(fastest_of_the_smallest(source, rules))
    if budget.target < least:
        raise UsageError(
            f"the target of {measure.show(budget.target)} is too small: one group per layer already takes "
            f"{measure.show(least)} in this pruning space; raise the target or prune more group types"
        )
