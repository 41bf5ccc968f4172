"""`[pruning]` section of a training run: groups, budget, schedule and criterion. Imports no torch."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from ...runtime.base import flags
from ...runtime.base.errors import OptionError
from ...runtime.base.quantities import parse_bytes, parse_count
from ...runtime.latency.shape import Workload
from ..model.file_types import BODY, SIZED
from ..model.groups import BLOCKS, KINDS, PRUNE_TYPES

EXAMPLE = "give a share of the source's time as 0.6x, or milliseconds as 8ms"


@dataclass(frozen=True)
class LatencyTarget:
    """A share or milliseconds, exactly one of them."""

    share: float | None = None
    ms: float | None = None

    @classmethod
    def parse(cls, text: str) -> LatencyTarget:
        """Parse 0.6x or 8ms. Raises ValueError for anything else."""
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(x|ms)\s*", text)
        if match is None or float(match.group(1)) <= 0:
            raise ValueError(EXAMPLE)
        amount = float(match.group(1))
        if match.group(2) == "ms":
            return cls(ms=amount)
        if amount > 1:
            raise ValueError(f"a share is at most 1x; {EXAMPLE}")
        return cls(share=amount)

    def of(self, source_ms: float) -> float:
        """Return the milliseconds for a source that takes `source_ms`."""
        return self.ms if self.ms is not None else (self.share or 1.0) * source_ms


TARGET_FIELDS = ("sizes", "target_ratio", "target_params", "target_bytes", "target_latency", "target_architecture")
"""Fields of PruneConfig that determine the final size. At most one has a value."""

NO_TARGET: dict[str, Any] = dict.fromkeys(TARGET_FIELDS) | {"sizes": ()}
"""Values of these fields without a target."""

SIZES_FILE = "sizes.json"
"""File of a run with --sizes that compares the finished models."""

FEWEST_PARAMETERS = 10_000
"""Smaller numbers without a unit are refused as sizes, because they are likely meant as megabytes."""

SIZE_EXAMPLE = "give shares (0.8), parameters (100M), bytes (60MB) or times (8ms or 0.6x)"


def size_target(text: str) -> tuple[str, Any]:
    """Return (target field of PruneConfig, its value) of a size: 0.8, 100M, 60MB, 8ms or 0.6x.

    Raises ValueError for anything else.
    """
    text = text.strip()
    try:
        if re.fullmatch(r"(0?\.[0-9]+|1|1\.0*)", text):
            return "target_ratio", float(text)
        if text.endswith(("ms", "x")):
            LatencyTarget.parse(text)
            return "target_latency", text
        if text[-1:] in "bB" and text[-2:-1].isalpha():
            return "target_bytes", parse_bytes(text)
        if text.isdigit() and int(text) < FEWEST_PARAMETERS:
            raise ValueError(text)
        return "target_params", parse_count(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no size; {SIZE_EXAMPLE}") from error


@dataclass(frozen=True)
class GroupsConfig:
    """Groups that may be removed."""

    prune: tuple[str, ...] = flags.comma_separated("attention", "ffn")
    """Pruning space, comma-separated: attention (heads and key/value heads), ffn, stem (hidden channels), vocabulary
    (rows; the tokenizer shrinks as well), blocks (the whole attention or FFN of a layer, or both), layers (both only);
    'none'."""
    layout: Literal["per-layer", "uniform"] = "per-layer"
    """per-layer: every layer its own widths; uniform: every layer loses its own least salient group at once."""
    width_multiple: int = flags.number(32, at_least=1)
    """Multiple of FFN and hidden widths in channels (quantised formats need 32), and of the vocabulary in rows."""
    vocabulary_rows: int | None = flags.count(None, at_least=1)
    """Vocabulary rows to keep, by frequency alone, such as 8192. The others are removed after the first step, and other
    groups do not compete with them (with --prune vocabulary)."""
    vocabulary_tokens: int = flags.count(2_000_000, at_least=1)
    """Tokens of the corpora that are counted for token frequencies (with --prune vocabulary)."""
    stem_channels: int | None = flags.count(None, at_least=1)
    """Stem channels to keep, such as 448 for a file of 10 MB. All others leave in the first removal, and other groups
    do not compete with them (with --prune stem)."""

    def check_groups(self) -> None:
        """Raise OptionError for an unknown kind, or a setting of a kind that is not given."""
        for kind in self.prune:
            allowed = kind in PRUNE_TYPES or self.prune == ("none",)
            flags.require(self, "prune", allowed, f"choose from {', '.join(PRUNE_TYPES)}, or none alone")
        has_no_rows = self.vocabulary_rows is None
        flags.require(self, "vocabulary_rows", has_no_rows or self.prunes_vocabulary, "needs --prune with vocabulary")
        keeps_stem = self.stem_channels is None or "stem" in self.prune
        flags.require(self, "stem_channels", keeps_stem, "needs --prune with stem")
        is_multiple = not (self.stem_channels or 0) % self.width_multiple
        flags.require(self, "stem_channels", is_multiple, f"give a multiple of --width-multiple {self.width_multiple}")

    @property
    def prunes_vocabulary(self) -> bool:
        """Tell whether vocabulary rows may be removed."""
        return "vocabulary" in self.prune

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the names of the group kinds in the pruning space (see groups.KINDS)."""
        return tuple(name for name, kind in KINDS.items() if kind.flag in self.prune)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Return the names of the whole blocks in the pruning space (see groups.BLOCKS)."""
        return tuple(name for name, kind in BLOCKS.items() if set(kind.flags) & set(self.prune))


@dataclass(frozen=True)
class SizeConfig:
    """Final size, in one of several measures, and the cost of a group in the ranking."""

    target_ratio: float | None = flags.number(None, above=0, at_most=1)
    """Share of the source's parameters to keep."""
    target_params: int | None = flags.count(None)
    """Parameters to keep, such as 100M."""
    target_bytes: int | None = flags.byte_count(None)
    """Bytes of the exported GGUF, such as 60MB, in the type of --quantize."""
    quantize: str = ""
    """Weight type of --target-bytes; default: that of --qat, else q8_0."""
    output_type: str = ""
    """Type of the LM head; default: that of --qat."""
    target_latency: str | None = None
    """Time of --workload on the device of --device-profile: a share of the source's (0.6x), or milliseconds (8ms)."""
    device_profile: str | None = None
    """Latency profile of the target device, written by efficientllm-bench --profile."""
    workload: str | None = None
    """Workload of --target-latency: prompt=256,answer=128 (tokens) for a whole answer, depth=512 for one token after
    512."""
    at_depth: int | None = flags.count(None)
    """Short for --workload depth=N."""
    target_architecture: str | None = None
    """JSON file of an architecture (such as a run's architecture.json) to prune towards, layer by layer."""
    sizes: tuple[str, ...] = flags.comma_separated()
    """Sizes of one run, comma-separated, in the unit of one target: 0.8,0.65,0.5 or 100MB,62MB,40MB. The run prunes to
    the smallest. Each larger one is finished from the run's state before the removal that goes below it."""
    rank_by: Literal["target", "parameters"] = "target"
    """Cost in the ranking: the unit of the target, or always parameters (the baseline)."""
    ranking_profile: str | None = None
    """Latency profile of another device for the ranking. The target stays that of --device-profile."""

    def check_size(self) -> None:
        """Raise OptionError unless there is at most one readable target with its own flags."""
        if len(self.targets) > 1:
            raise ValueError(f"{' and '.join(map(flags.flag_name, self.targets))} are both given; choose one")
        is_known = not self.quantize or self.quantize in BODY
        flags.require(self, "quantize", is_known, f"--target-bytes supports {', '.join(BODY)}")
        is_known = not self.output_type or self.output_type in SIZED
        flags.require(self, "output_type", is_known, f"--target-bytes supports {', '.join(SIZED)}")
        self._check_sizes()
        self._check_latency()

    def _check_sizes(self) -> None:
        """Raise OptionError unless the sizes have one unit and fall."""
        if not self.sizes:
            return
        try:
            targets = [size_target(text) for text in self.sizes]
        except ValueError as error:
            raise OptionError(f"--sizes: {error}") from error
        is_one_unit = len({name for name, _ in targets}) == 1
        flags.require(self, "sizes", is_one_unit, f"have different units; {SIZE_EXAMPLE}", value=",".join(self.sizes))
        amounts = [float(str(value).rstrip("msx")) for _, value in targets]
        is_falling = all(larger > smaller for larger, smaller in itertools.pairwise(amounts))
        flags.require(self, "sizes", is_falling, "must fall from left to right", value=",".join(self.sizes))
        for text in self.sizes:
            self.of_size(text)

    def _check_latency(self) -> None:
        """Raise OptionError unless the flags of --target-latency are complete and readable."""
        if self.sizes:
            return  # checked with each size as the target
        if self.target_latency is None:
            for name in ("device_profile", "workload", "at_depth", "ranking_profile"):
                flags.require(self, name, getattr(self, name) is None, "applies only to --target-latency; set it")
            return
        try:
            LatencyTarget.parse(self.target_latency)
        except ValueError as error:
            raise OptionError(f"--target-latency {self.target_latency}: {error}") from error
        flags.require(self, "target_latency", self.device_profile is not None, "needs --device-profile FILE")
        asked = [name for name in ("workload", "at_depth") if getattr(self, name) is not None]
        is_for_time = self.ranking_profile is None or self.rank_by == "target"
        flags.require(self, "ranking_profile", is_for_time, "ranks by milliseconds; omit --rank-by")
        rule = "needs either --workload prompt=256,answer=128 or --at-depth 512"
        flags.require(self, "target_latency", len(asked) == 1, rule)
        _ = self.asked_workload

    def of_size(self, text: str) -> Self:
        """Return these settings with one size as the target."""
        name, value = size_target(text)
        return replace(self, **NO_TARGET | {name: value})

    @property
    def of_smallest_size(self) -> Self:
        """Return these settings with the smallest of their sizes as the target."""
        return self.of_size(self.sizes[-1]) if self.sizes else self

    @property
    def asked_workload(self) -> Workload | None:
        """Return the workload of --target-latency, or None without one."""
        if self.at_depth is not None:
            return Workload.at_depth(self.at_depth)
        return Workload.parse(self.workload) if self.workload is not None else None

    @property
    def targets(self) -> list[str]:
        """Return the target fields with a value."""
        return [name for name, none in NO_TARGET.items() if getattr(self, name) != none]


@dataclass(frozen=True)
class ScheduleConfig:
    """Times of removals."""

    prune_start: float = flags.number(0.05, at_least=0, at_most=1)
    """Share of the tokens seen before the first removal."""
    prune_end: float = 0.5
    """Share of the tokens at which the target is reached. The rest trains the final architecture."""
    prune_every: int = flags.number(1, at_least=1)
    """Optimizer steps per pruning event (the paper's N)."""
    removals: int = flags.number(0, at_least=0)
    """Total number of removals, evenly spread from --prune-start to --prune-end, each of an equal part of the budget;
    replaces --prune-every."""

    def check_schedule(self) -> None:
        """Raise OptionError for times that exclude each other."""
        flags.require(self, "prune_end", self.prune_start <= self.prune_end <= 1, "must be in [--prune-start, 1]")
        is_spread = self.removals <= 1 or self.prune_start < self.prune_end
        flags.require(self, "removals", is_spread, "needs --prune-end after --prune-start")
        one_spacing = not self.removals or self.prune_every == 1
        flags.require(self, "removals", one_spacing, "are evenly spread; omit --prune-every")

    @property
    def keeps_later_steps(self) -> bool:
        """Tell whether a run with --sizes writes the changes between its removals, which takes few removals."""
        return self.removals > 0 or self.prune_start == self.prune_end


@dataclass(frozen=True)
class CriterionConfig:
    """Scores of groups and blocks."""

    saliency: str = "taylor1"
    """Criterion, such as token-fisher. docs/method.md describes all. An unknown name lists those that are installed."""
    saliency_decay: float = flags.number(0.9, at_least=0, below=1)
    """Decay of the saliency's exponential average, per optimizer step."""
    score_scale: Literal["auto", "blocks", "saliency"] = "auto"
    """blocks: a group's saliency is its share of its block's measured price; saliency: unscaled; auto: blocks if whole
    blocks or vocabulary rows may be removed or groups compete for milliseconds."""
    block_tokens: int = flags.count(4096, at_least=1)
    """Tokens of the corpora that measure the loss without a block."""
    block_renewals: int = flags.number(8, at_least=1)
    """Measurements of all blocks while the budget falls. The next block to be removed is always measured again."""


@dataclass(frozen=True)
class RecoveryConfig:
    """Corrections of the remaining weights by a removal."""

    weight_update: Literal["none", "obs"] = "none"
    """obs: the remaining weights of a layer compensate the removed ones (second order)."""
    obs_decay: float = flags.number(0.95, at_least=0, below=1)
    """Decay of the running average of a layer's input Gram matrix, per forward pass."""
    obs_damping: float = flags.number(0.01, above=0)
    """Damping of the Gram matrix, relative to the mean of its diagonal."""
    obs_max_width: int = flags.number(0, at_least=0)
    """Largest input width with an update. 0: no limit."""
    obs_rows: int = flags.count(512, at_least=0)
    """Tokens per forward pass for the Gram matrices. 0: all."""
    recover: Literal["none", "least-squares"] = "none"
    """least-squares: after every removal, refit o_proj and down_proj, layer by layer, to restore the residual stream
    (forward passes of --recover-tokens; use it with few removals: see --removals)."""
    recover_tokens: int = flags.count(16_384, at_least=1)
    """Tokens of the corpora for the fit."""
    recover_damping: float = flags.number(1.0, above=0)
    """Damping of the fit towards the current weights, relative to the mean of the squared inputs."""


@dataclass(frozen=True)
class PruneConfig(RecoveryConfig, CriterionConfig, ScheduleConfig, SizeConfig, GroupsConfig):
    """Pruning."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        self.check_groups()
        self.check_size()
        self._check_blocks()
        self.check_schedule()

    def _check_blocks(self) -> None:
        shown = ",".join(self.prune)
        if self.prunes_vocabulary:
            rule = "vocabulary rows need scores in one unit"
            is_in_one_unit = self.score_scale != "saliency" or self.vocabulary_rows is not None
            flags.require(self, "score_scale", is_in_one_unit, rule)
            rule = "--target-architecture does not support vocabulary rows; use another target"
            flags.require(self, "prune", self.target_architecture is None, rule, value=shown)
        alone = self.target_architecture is None or self.stem_channels is None
        flags.require(self, "stem_channels", alone, "--target-architecture determines the stem; omit it")
        if self.blocks:
            rule = "needs layers that may differ: use --layout per-layer"
            flags.require(self, "prune", self.layout == "per-layer", rule, value=shown)
            flags.require(self, "score_scale", self.score_scale != "saliency", "blocks need scores in one unit")
            rule = "--target-architecture determines the blocks; omit them"
            flags.require(self, "prune", self.target_architecture is None, rule, value=shown)

    @property
    def measures_blocks(self) -> bool:
        """Tell whether block prices scale the groups' saliency."""
        if self.score_scale != "auto":
            return self.score_scale == "blocks"
        if self.prunes_vocabulary and self.vocabulary_rows is None:  # unless nothing competes with the rows
            return self.prune != ("vocabulary",)
        return bool(self.blocks) or (self.target_latency is not None and self.rank_by == "target")

    @property
    def prunes(self) -> bool:
        """Tell whether anything is pruned."""
        return self.prune != ("none",) and bool(self.targets)
