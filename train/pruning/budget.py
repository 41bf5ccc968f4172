"""What a run prunes towards: parameters, the bytes of an exported file, or an explicit architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...runtime.base.errors import UsageError
from ...runtime.base.quantities import format_bytes, format_count
from ..model.architecture import Architecture
from ..model.file_size import gguf_bytes
from .config import PruneConfig
from .selection import SelectionRules, smallest_architecture


@dataclass(frozen=True)
class Budget:
    """A target and how an architecture is measured against it."""

    target: int
    unit: str
    """parameters or bytes"""
    measure: Callable[[Architecture], int]

    def describe(self) -> str:
        """The target as people read it."""
        if self.unit == "bytes":
            return format_bytes(self.target)
        return f"{format_count(self.target)} {self.unit}"

    def is_met(self, architecture: Architecture) -> bool:
        return self.measure(architecture) <= self.target


def read_architecture(path: Path) -> Architecture:
    """An architecture file: Architecture.to_dict as JSON, or a run's architecture.json (its `final`)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--target-architecture {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"--target-architecture {path}: not valid JSON: {error}") from error
    return Architecture.from_dict(value.get("final", value))


def make_budget(
    settings: PruneConfig, source: Architecture, floor: Architecture | None, vocabulary_bytes: int
) -> Budget | None:
    """The budget that the settings ask for; None where nothing is to be pruned.

    `floor`: the explicit target architecture, where there is one. `vocabulary_bytes`: bytes of the tokenizer in an
    exported file.
    """
    if floor is not None:
        return Budget(floor.num_parameters, "parameters", _count)
    if settings.target_bytes is not None:
        quantize = settings.quantize
        return Budget(
            settings.target_bytes, "bytes", lambda architecture: gguf_bytes(architecture, quantize, vocabulary_bytes)
        )
    if settings.target_params is not None:
        return Budget(settings.target_params, "parameters", _count)
    if settings.target_ratio is not None:
        return Budget(round(settings.target_ratio * source.num_parameters), "parameters", _count)
    return None


def _count(architecture: Architecture) -> int:
    return architecture.num_parameters


def check_budget(budget: Budget, source: Architecture, rules: SelectionRules) -> None:
    """UsageError where the target is more than the source has or less than pruning may leave."""

    def show(amount: int) -> str:
        return format_bytes(amount) if budget.unit == "bytes" else f"{amount:,} parameters"

    if budget.target > budget.measure(source):
        raise UsageError(
            f"the target of {show(budget.target)} is larger than the source's {show(budget.measure(source))}; "
            "choose a smaller one"
        )
    least = budget.measure(smallest_architecture(source, rules))
    if budget.target < least:
        raise UsageError(
            f"the target of {show(budget.target)} is too small: one group per layer already takes {show(least)} "
            "in this pruning space; raise the target or prune more group types"
        )
