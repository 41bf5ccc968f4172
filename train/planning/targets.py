"""Evaluate targets in milliseconds and the cost of each kind of group on a device, as text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ...runtime.base.errors import UsageError
from ...runtime.base.quantities import format_bytes, format_count, markdown_table
from ..config.pruning import LatencyTarget
from ..model.architecture import Architecture
from ..model.file_types import gguf_bytes, has_known_size
from ..model.groups import BLOCKS, KINDS, counts
from ..pruning.measures import DeviceTime, decoder_shape
from ..pruning.running_scores import Scores
from ..pruning.selection import SelectionRules, select_removal, smallest_architecture


@dataclass(frozen=True)
class Meaning:
    """Shapes that reach a target."""

    ms: float
    largest: Architecture
    """The shape with the most parameters, from a ranking by milliseconds per parameter. A run also weighs saliency, so
    it ends with fewer."""
    equal: Architecture | None
    """The same with equal layers; None if the source's layers differ."""


def meaning(source: Architecture, time: DeviceTime, target: LatencyTarget, rules: SelectionRules) -> Meaning:
    """Return the shapes that reach a target on a device. Raises UsageError if it cannot be reached."""
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
    """Return the parameters of every group as its score."""
    scores: Scores = {}
    for name in rules.kinds:
        kind, scores[name] = KINDS[name], []
        for layer, count in enumerate(counts(name, source)):
            parameters = 0.0
            if count:
                size = kind.step(source, layer, 1)  # the least that a shape can lose
                freed = source.num_parameters - kind.shrink(source, layer, size).num_parameters
                parameters = freed / max(1, size)
            scores[name].append(torch.full((count,), parameters, dtype=torch.float64))
    for name in rules.blocks:
        sizes = (_block_size(source, name, layer) for layer in range(len(source.layers)))
        scores[name] = [torch.tensor([size]) for size in sizes]
    return scores


def _block_size(source: Architecture, name: str, layer: int) -> float:
    if not BLOCKS[name].is_in(source, layer):
        return 0.0
    return float(source.num_parameters - BLOCKS[name].without(source, layer).num_parameters)


def weight_bytes(architecture: Architecture, time: DeviceTime) -> int | None:
    """Return the bytes of the weights as GGUF in the profile's type; None for another engine's type."""
    quantization = time.profile.measured_on.quantization
    return gguf_bytes(architecture, quantization, 0) if has_known_size(quantization) else None


FFN_CHANNELS, STEM_CHANNELS = 256, 64
"""Channels removed at once, enough to exceed the step of a kernel."""


@dataclass(frozen=True)
class Candidate:
    """A removable part, and the shapes without it (one per layer, or one)."""

    title: str
    remaining: tuple[Architecture, ...]

    def parameters(self, source: Architecture) -> float:
        """Return its parameters, the mean over layers."""
        return statistics.fmean(source.num_parameters - shape.num_parameters for shape in self.remaining)

    def milliseconds(self, source: Architecture, time: DeviceTime) -> float:
        """Return its milliseconds, the mean over layers."""
        before = time.measure.of(source)
        return statistics.fmean(before - time.measure.of(shape) for shape in self.remaining)


def candidates(source: Architecture) -> list[Candidate]:
    """Return candidates for every kind of group and block of which the source has more than one."""
    found = [
        Candidate("a key/value group of every layer", _everywhere(source, "kv_group", lambda shape, layer: 1)),
        Candidate(
            "a query head of every group of every layer",
            _everywhere(source, "query_head", lambda shape, layer: shape.layers[layer].num_key_value_heads),
        ),
        Candidate(
            f"{FFN_CHANNELS} FFN channels of every layer", _everywhere(source, "ffn", lambda shape, layer: FFN_CHANNELS)
        ),
    ]
    if source.hidden_size > STEM_CHANNELS:
        smaller = KINDS["stem"].shrink(source, 0, STEM_CHANNELS)
        found.append(Candidate(f"{STEM_CHANNELS} stem channels", (smaller,)))
    for name, block in BLOCKS.items():
        title = "a layer" if name == "layer" else f"the {block.title}"
        layers = [layer for layer in range(len(source.layers)) if block.is_in(source, layer)]
        found.append(Candidate(title, tuple(block.without(source, layer) for layer in layers)))
    return [candidate for candidate in found if candidate.remaining]


def _everywhere(source: Architecture, name: str, count: Callable[[Architecture, int], int]) -> tuple[Architecture, ...]:
    """Return (the shape with that many removed in every layer that has more), or () if none has."""
    smaller = source
    for layer in range(len(source.layers)):
        groups = count(source, layer)
        if groups < KINDS[name].count(source, layer):
            smaller = KINDS[name].shrink(smaller, layer, groups)
    return (smaller,) if smaller != source else ()


def device_lines(source: Architecture, time: DeviceTime) -> list[str]:
    """Describe the device, the error of its profile, and the source's milliseconds by part."""
    found = time.profile.breakdown(decoder_shape(source), time.workload)
    parts = f"attention {sum(found.attention_ms):.2f}, FFN {sum(found.ffn_ms):.2f}"
    parts += f", LM head {found.head_ms:.2f}, rest {found.token_ms:.2f}"
    lines = [f"{time.describe()}: {time.measure.of(source):.2f} ms ({parts})"]
    for error in time.profile.errors:
        lines.append(
            f"  the profile's error on {error.models} irregular models at depth {error.depth}: median "
            f"{error.median:.1%}, worst {error.worst:.1%}"
        )
    if time.profile.measured_on.emulated:
        lines.append("  EMULATED: no figure here is the device's")
    return lines


def price_table(source: Architecture, found: Sequence[Candidate], times: Sequence[DeviceTime]) -> str:
    """Return the table of candidates with milliseconds, and microseconds per million parameters, by device."""
    header = ["what goes", "parameters"]
    for time in times:
        name = time.profile.measured_on.device if len(times) > 1 else ""
        header += [f"{name} ms".strip(), f"{name} us per M".strip()]
    rows = [header]
    for candidate in found:
        parameters = candidate.parameters(source)
        row = [candidate.title, format_count(parameters)]
        for time in times:
            ms = candidate.milliseconds(source, time)
            row += [f"{ms:.3f}", f"{1e9 * ms / parameters:.0f}"]
        rows.append(row)
    return markdown_table(rows)


def target_table(source: Architecture, found: Sequence[tuple[str, DeviceTime, Meaning]]) -> str:
    """Return the table of targets with remaining parameters (and bytes of weights for GGUF types)."""
    rows = [["target", "device", "ms", "leaves at most", "in equal layers"]]
    for target, time, meaning in found:
        device = time.profile.measured_on.device
        sizes = [_size(shape, source, time) for shape in (meaning.largest, meaning.equal)]
        rows.append([target, device, f"{meaning.ms:.2f}", *sizes])
    return markdown_table(rows, left=(0, 1))


def _size(architecture: Architecture | None, source: Architecture, time: DeviceTime) -> str:
    if architecture is None:
        return "-"
    share = architecture.num_parameters / source.num_parameters
    size = weight_bytes(architecture, time)
    stored = f", {format_bytes(size)}" if size is not None else ""
    return f"{format_count(architecture.num_parameters)} ({share:.0%}{stored})"
