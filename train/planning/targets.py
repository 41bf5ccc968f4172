"""What a target in milliseconds means: how many parameters it leaves at most, and in equal layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...runtime.base.errors import UsageError
from ..model.architecture import Architecture
from ..model.file_size import gguf_bytes, has_known_size
from ..pruning.groups import BLOCKS, KINDS, counts
from ..pruning.latency_target import LatencyTarget
from ..pruning.measures import DeviceTime
from ..pruning.running_scores import Scores
from ..pruning.selection import SelectionRules, select_removal, smallest_architecture


@dataclass(frozen=True)
class Meaning:
    """What reaching a target leaves."""

    ms: float
    largest: Architecture
    """The most parameters that a ranking leaves: what frees most milliseconds per parameter goes first. A run weighs
    saliency against the milliseconds, so it ends with fewer."""
    equal: Architecture | None
    """The same with equal layers; None where the source's are not."""


def meaning(source: Architecture, time: DeviceTime, target: LatencyTarget, rules: SelectionRules) -> Meaning:
    """Of a target on a device, in a pruning space; UsageError where it cannot be reached there."""
    rules, ms = replace(rules, measure=time.measure), target.of(time.measure.of(source))
    least = time.measure.of(smallest_architecture(source, rules))
    if ms < least:
        raise UsageError(f"a target of {ms:.3f} ms is too small: one group per layer already takes {least:.3f} ms")
    equal = None
    if source.is_uniform:
        together = replace(rules, uniform=True, blocks=())
        smaller = select_removal(source, group_sizes(source, together), together, ms).after
        equal = smaller if time.measure.of(smaller) <= ms else None
    return Meaning(ms, select_removal(source, group_sizes(source, rules), rules, ms).after, equal)


def group_sizes(source: Architecture, rules: SelectionRules) -> Scores:
    """Parameters of every group as its score."""
    scores: Scores = {}
    for name in rules.kinds:
        step = KINDS[name].step
        scores[name] = []
        for layer, count in enumerate(counts(name, source)):
            size = step(source, layer, 1) if count else 0  # the least that a shape can lose
            freed = source.num_parameters - KINDS[name].shrink(source, layer, size).num_parameters if size else 0
            scores[name].append(torch.full((count,), freed / max(1, size), dtype=torch.float64))
    for name in rules.blocks:
        scores[name] = [torch.tensor([_block_size(source, name, layer)]) for layer in range(len(source.layers))]
    return scores


def _block_size(source: Architecture, name: str, layer: int) -> float:
    if not BLOCKS[name].is_in(source, layer):
        return 0.0
    return float(source.num_parameters - BLOCKS[name].without(source, layer).num_parameters)


def weight_bytes(architecture: Architecture, time: DeviceTime) -> int | None:
    """Bytes of the weights as GGUF in the profile's type; None for a type of another engine."""
    quantization = time.profile.measured_on.quantization
    return gguf_bytes(architecture, quantization, 0) if has_known_size(quantization) else None
