"""The `[pruning]` section of a training run: what may go, how much, when and by which criterion. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...runtime.base import flags
from ...runtime.base.errors import OptionError
from ...runtime.latency.shape import Workload
from ..model.file_types import BODY, TENSOR_BLOCKS
from .groups import BLOCKS, KINDS, PRUNE_TYPES
from .latency_target import LatencyTarget


@dataclass(frozen=True)
class PruneConfig:
    """pruning"""

    prune: tuple[str, ...] = flags.comma_separated("attention", "ffn")
    """Pruning space, comma-separated: attention (heads and key/value groups), ffn, stem (hidden channels), vocabulary
    (tokens: the tokenizer shrinks, too), blocks (the whole attention or FFN of a layer, or both), layers (both only);
    'none'."""
    target_ratio: float | None = flags.number(None, above=0, at_most=1)
    """Share of the source's parameters to keep."""
    target_params: int | None = flags.count(None)
    """Parameters to keep, as 100M."""
    target_bytes: int | None = flags.byte_count(None)
    """Bytes of the exported GGUF, as 60MB, in the type of --quantize."""
    quantize: str = ""
    """Weight type that --target-bytes is measured in; default: that of --qat, else q8_0."""
    output_type: str = ""
    """Type of its LM head where the exporter's default is not wanted; default: that of --qat."""
    target_latency: str | None = None
    """Time of --workload on the device of --device-profile: a share of the source's (0.6x), or milliseconds (8ms)."""
    device_profile: str | None = None
    """Profile of the device that --target-latency means, as efficientllm-bench --profile writes it."""
    workload: str | None = None
    """What --target-latency times: prompt=256,answer=128 (tokens) a whole answer, depth=512 one token after 512."""
    at_depth: int | None = flags.count(None)
    """The same as --workload depth=N."""
    target_architecture: str | None = None
    """JSON file of an architecture (as a run's architecture.json) to prune towards, layer by layer."""
    rank_by: Literal["target", "parameters"] = "target"
    """What groups compete for: saliency per millisecond or byte, whichever the target is in, or always per parameter
    (the baseline)."""
    ranking_profile: str | None = None
    """Profile of another device: groups compete for its milliseconds, the target stays that of --device-profile (what a
    model that was pruned for one device is worth on another)."""
    layout: Literal["per-layer", "uniform"] = "per-layer"
    """per-layer: every layer its own widths; uniform: every layer loses its own least salient group at once."""
    saliency: str = "taylor1"
    """Criterion: taylor1, taylor2, fisher, token-fisher, magnitude, random, one of activations (flap, wanda, minitron),
    or one registered by a plug-in."""
    saliency_decay: float = flags.number(0.9, at_least=0, below=1)
    """Weight of the past in the saliency's exponential average, per optimizer step."""
    width_multiple: int = flags.number(32, at_least=1)
    """FFN and hidden widths stay multiples of this many channels (quantised formats need 32), the vocabulary of as many
    rows."""
    prune_start: float = flags.number(0.05, at_least=0, at_most=1)
    """Share of the tokens seen before the first removal."""
    prune_end: float = 0.5
    """Share of the tokens by which the target is reached; the rest trains the final architecture."""
    prune_every: int = flags.number(1, at_least=1)
    """Optimizer steps per pruning event (the paper's N)."""
    removals: int = flags.number(0, at_least=0)
    """Removals in all, evenly spread from --prune-start to --prune-end, each of an equal part of the budget: instead of
    --prune-every."""
    compact_every: int = flags.number(1, at_least=1)
    """Pruning events between physical removals; groups removed in between are only zeroed."""
    weight_update: Literal["none", "obs"] = "none"
    """obs: the remaining weights of a layer absorb the removed ones (second order)."""
    obs_decay: float = flags.number(0.95, at_least=0, below=1)
    """Weight of the past in the running average of a layer's input Gram matrix, per forward pass."""
    obs_damping: float = flags.number(0.01, above=0)
    """Damping of the Gram matrix, relative to the mean of its diagonal."""
    obs_max_width: int = flags.number(0, at_least=0)
    """Leave layers with wider inputs without an update; 0: no limit."""
    obs_rows: int = flags.count(512, at_least=0)
    """Tokens per forward pass that enter the Gram matrices; 0: all."""

    score_scale: Literal["auto", "blocks", "saliency"] = "auto"
    """blocks: a group's saliency counts as its share of what its block is worth, which is measured; saliency: as it is;
    auto: blocks where whole blocks or vocabulary rows may go or groups compete for milliseconds."""
    block_tokens: int = flags.count(4096, at_least=1)
    """Tokens of the corpora on which the loss without a block is measured."""
    block_renewals: int = flags.number(8, at_least=1)
    """Times that all blocks are measured anew while the budget falls; one that is about to go always is."""

    vocabulary_tokens: int = flags.count(2_000_000, at_least=1)
    """Tokens of the corpora that are counted to tell how often each token is written (with --prune vocabulary)."""
    vocabulary_prior: float = flags.number(0.5, above=0, at_most=1)
    """Weight of what the tokenizer tells of the text that it was trained on, against those counts: text to come is of
    other kinds, too."""

    recover: Literal["none", "least-squares"] = "none"
    """least-squares: after every removal, o_proj and down_proj are fitted again, layer by layer, so that the residual
    stream is what it was before (forward passes of --recover-tokens; meant for few removals: see --removals)."""
    recover_tokens: int = flags.count(16_384, at_least=1)
    """Tokens of the corpora that the fit sees."""
    recover_damping: float = flags.number(1.0, above=0)
    """Pull of the fit towards the weights at hand, relative to the mean of the inputs' squares."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        for kind in self.prune:
            allowed = kind in PRUNE_TYPES or self.prune == ("none",)
            flags.require(self, "prune", allowed, f"choose from {', '.join(PRUNE_TYPES)}, or none alone")
        if len(self.targets) > 1:
            raise ValueError(f"{' and '.join(map(flags.flag_name, self.targets))} are both given; choose one")
        is_known = not self.quantize or self.quantize in BODY
        flags.require(self, "quantize", is_known, f"--target-bytes knows {', '.join(BODY)}")
        is_known = not self.output_type or self.output_type in TENSOR_BLOCKS
        flags.require(self, "output_type", is_known, f"--target-bytes knows {', '.join(TENSOR_BLOCKS)}")
        self._check_latency()
        self._check_blocks()
        flags.require(self, "prune_end", self.prune_start <= self.prune_end <= 1, "must be in [--prune-start, 1]")
        is_spread = self.removals <= 1 or self.prune_start < self.prune_end
        flags.require(self, "removals", is_spread, "need --prune-end after --prune-start")
        one_spacing = not self.removals or self.prune_every == 1
        flags.require(self, "removals", one_spacing, "are evenly spread; leave out --prune-every")
        at_once = self.recover == "none" or self.compact_every == 1
        flags.require(self, "compact_every", at_once, "must be 1 with --recover, which fits what is left")

    def _check_latency(self) -> None:
        """OptionError unless the flags of --target-latency come together and can be read."""
        if self.target_latency is None:
            for name in ("device_profile", "workload", "at_depth", "ranking_profile"):
                flags.require(self, name, getattr(self, name) is None, "is for --target-latency; give one")
            return
        try:
            LatencyTarget.parse(self.target_latency)
        except ValueError as error:
            raise OptionError(f"--target-latency {self.target_latency}: {error}") from error
        flags.require(self, "target_latency", self.device_profile is not None, "needs --device-profile FILE")
        asked = [name for name in ("workload", "at_depth") if getattr(self, name) is not None]
        is_for_time = self.ranking_profile is None or self.rank_by == "target"
        flags.require(self, "ranking_profile", is_for_time, "ranks by milliseconds; leave out --rank-by")
        rule = "needs either --workload prompt=256,answer=128 or --at-depth 512"
        flags.require(self, "target_latency", len(asked) == 1, rule)
        _ = self.asked_workload

    def _check_blocks(self) -> None:
        if self.prunes_vocabulary:
            rule = "vocabulary rows need scores in one unit"
            flags.require(self, "score_scale", self.score_scale != "saliency", rule)
            rule = "vocabulary rows have no place in --target-architecture; give another target"
            flags.require(self, "prune", self.target_architecture is None, rule, value=",".join(self.prune))
        if self.blocks:
            shown = ",".join(self.prune)
            rule = "needs layers that may differ: use --layout per-layer"
            flags.require(self, "prune", self.layout == "per-layer", rule, value=shown)
            flags.require(self, "score_scale", self.score_scale != "saliency", "blocks need scores in one unit")
            rule = "--target-architecture says which blocks go; leave them out"
            flags.require(self, "prune", self.target_architecture is None, rule, value=shown)

    @property
    def measures_blocks(self) -> bool:
        """Whether groups share out what their block is worth."""
        if self.score_scale != "auto":
            return self.score_scale == "blocks"
        if self.prunes_vocabulary:  # unless rows are all that may go
            return self.prune != ("vocabulary",)
        return bool(self.blocks) or (self.target_latency is not None and self.rank_by == "target")

    @property
    def prunes_vocabulary(self) -> bool:
        """Whether tokens may go."""
        return "vocabulary" in self.prune

    @property
    def asked_workload(self) -> Workload | None:
        """What --target-latency times; None without one."""
        if self.at_depth is not None:
            return Workload.at_depth(self.at_depth)
        return Workload.parse(self.workload) if self.workload is not None else None

    @property
    def targets(self) -> list[str]:
        """The fields of the targets that are given."""
        named = ("target_ratio", "target_params", "target_bytes", "target_latency", "target_architecture")
        return [name for name in named if getattr(self, name) is not None]

    @property
    def prunes(self) -> bool:
        """Whether anything is to go."""
        return self.prune != ("none",) and bool(self.targets)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the group kinds in the pruning space (see groups.KINDS)."""
        return tuple(name for name, kind in KINDS.items() if kind.flag in self.prune)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the whole blocks in the pruning space (see groups.BLOCKS)."""
        return tuple(name for name, kind in BLOCKS.items() if set(kind.flags) & set(self.prune))
