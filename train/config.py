"""The configuration of a training run: one frozen dataclass per section, every field a flag. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..runtime import flags
from ..runtime.quantities import parse_bytes, parse_count
from .file_size import BITS

PRUNE_TYPES = ("attention", "ffn", "stem")


def _count(default: int | None) -> Any:
    return field(default=default, metadata={"parse": parse_count})


def _commas(*default: str) -> Any:
    return field(default=default, metadata={"comma_separated": True})


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{flags.flag_name(name)} {value}: {rule}")


@dataclass(frozen=True)
class SourceConfig:
    """source model and text"""

    source: str = "demo"
    """Model to start from: a Hugging Face folder or hub id, a .gguf file, or 'demo' (SmolLM2-135M-Instruct)."""
    data: tuple[str, ...] = ("demo",)
    """Text to train on, PATH[:WEIGHT], repeatable: .txt, .jsonl(.gz), .parquet, a folder of them, a hub dataset id
    (owner/name[@config]), or 'demo' (Wikipedia lead sections)."""
    held_out_fraction: float = 0.05
    """Share of the documents, chosen by hash, that is never trained on and measures perplexity."""
    eval_tokens: int = _count(16_384)
    """Held-out tokens per evaluation."""
    init: Literal["source", "random"] = "source"
    """random: forget the source's weights and train its shape from scratch (the baseline)."""
    sequence_length: int = _count(512)
    """Tokens per training sequence."""

    def __post_init__(self) -> None:
        _require(bool(self.data), "data", "", "give at least one corpus")
        _require(0 < self.held_out_fraction < 1, "held_out_fraction", self.held_out_fraction, "must be between 0 and 1")
        _require(self.sequence_length >= 8, "sequence_length", self.sequence_length, "must be at least 8")
        _require(self.eval_tokens >= 1, "eval_tokens", self.eval_tokens, "must be positive")


@dataclass(frozen=True)
class PruneConfig:
    """pruning"""

    prune: tuple[str, ...] = _commas("attention", "ffn")
    """Pruning space, comma-separated: attention (heads and key/value groups), ffn, stem (hidden channels); 'none'."""
    target_ratio: float | None = None
    """Share of the source's parameters to keep."""
    target_params: int | None = _count(None)
    """Parameters to keep, as 100M."""
    target_bytes: int | None = field(default=None, metadata={"parse": parse_bytes})
    """Bytes of the exported GGUF, as 60MB, in the type of --quantize."""
    quantize: str = "q8_0"
    """Weight type that --target-bytes is measured in."""
    target_architecture: str | None = None
    """JSON file of an architecture (as a run's architecture.json) to prune towards, layer by layer."""
    layout: Literal["per-layer", "uniform"] = "per-layer"
    """per-layer: every layer its own widths; uniform: every layer loses its own least salient group at once."""
    saliency: str = "taylor1"
    """Criterion: taylor1, taylor2, magnitude, random, or one registered by a plug-in."""
    saliency_decay: float = 0.9
    """Weight of the past in the saliency's exponential average, per optimizer step."""
    width_multiple: int = 32
    """FFN and hidden widths stay multiples of this many channels (quantised formats need 32)."""
    prune_start: float = 0.05
    """Share of the tokens seen before the first removal."""
    prune_end: float = 0.5
    """Share of the tokens by which the target is reached; the rest trains the final architecture."""
    prune_every: int = 1
    """Optimizer steps per pruning event (the paper's N)."""
    compact_every: int = 1
    """Pruning events between physical removals; groups removed in between are only zeroed."""
    weight_update: Literal["none", "obs"] = "none"
    """obs: the remaining weights of a layer absorb the removed ones (second order)."""
    obs_decay: float = 0.95
    """Weight of the past in the running average of a layer's input Gram matrix, per forward pass."""
    obs_damping: float = 0.01
    """Damping of the Gram matrix, relative to the mean of its diagonal."""
    obs_max_width: int = 0
    """Leave layers with wider inputs without an update; 0: no limit."""
    obs_rows: int = _count(512)
    """Tokens per forward pass that enter the Gram matrices; 0: all."""

    def __post_init__(self) -> None:
        for kind in self.prune:
            allowed = kind in PRUNE_TYPES or self.prune == ("none",)
            _require(allowed, "prune", ",".join(self.prune), f"choose from {', '.join(PRUNE_TYPES)}, or none alone")
        named = ("target_ratio", "target_params", "target_bytes", "target_architecture")
        given = [flags.flag_name(name) for name in named if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; choose one")
        _require(self.quantize in BITS, "quantize", self.quantize, f"--target-bytes knows {', '.join(BITS)}")
        if self.target_ratio is not None:
            _require(0 < self.target_ratio <= 1, "target_ratio", self.target_ratio, "must be above 0 and at most 1")
        _require(0 <= self.saliency_decay < 1, "saliency_decay", self.saliency_decay, "must be at least 0 and below 1")
        _require(self.width_multiple >= 1, "width_multiple", self.width_multiple, "must be positive")
        _require(0 <= self.prune_start <= 1, "prune_start", self.prune_start, "must be between 0 and 1")
        _require(self.prune_start <= self.prune_end <= 1, "prune_end", self.prune_end, "must be in [--prune-start, 1]")
        for name in ("prune_every", "compact_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(0 <= self.obs_decay < 1, "obs_decay", self.obs_decay, "must be at least 0 and below 1")
        _require(self.obs_damping > 0, "obs_damping", self.obs_damping, "must be positive")
        for name in ("obs_max_width", "obs_rows"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Group kinds of the pruning space (see saliency.GROUP_KINDS)."""
        by_type = {"attention": ("kv_group", "query_head"), "ffn": ("ffn",), "stem": ("stem",), "none": ()}
        return tuple(kind for name in (*PRUNE_TYPES, "none") if name in self.prune for kind in by_type[name])


@dataclass(frozen=True)
class OptimizerConfig:
    """optimisation"""

    tokens: int = _count(1_000_000)
    """Tokens to train on in all."""
    batch_size: int = 4
    """Sequences per microbatch and process."""
    gradient_accumulation: int = 1
    """Microbatches per optimizer step."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warm-up, stable, linear decay; cosine; constant."""
    lr_warmup: float = 0.05
    """Share of the tokens for the linear warm-up."""
    lr_decay: float = 0.3
    """Share of the tokens for wsd's final decay."""
    lr_floor: float = 0.1
    """Final learning rate as a share of the peak."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    distill: float = 0.0
    """Weight of the KL divergence from the unpruned source's predictions, added to the loss; 0: off."""
    cross_entropy: float = 1.0
    """Weight of the next-token cross-entropy; 0 leaves distillation alone."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "gradient_accumulation"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be positive")
        for name in ("learning_rate", "max_grad_norm"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("lr_warmup", "lr_decay", "lr_floor"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be between 0 and 1")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must be at least 0 and below 1")
        for name in ("weight_decay", "distill", "cross_entropy"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        alone = self.cross_entropy > 0 or self.distill > 0
        _require(alone, "cross_entropy", self.cross_entropy, "give --distill something to train on")


@dataclass(frozen=True)
class RunConfig:
    """run"""

    output: str = ""
    """Folder of the run: checkpoints, metrics and the final model."""
    overwrite: bool = False
    """Delete what is in --output and start anew."""
    resume: bool = False
    """Continue from the last complete checkpoint in --output."""
    checkpoint_every: int = 200
    """Optimizer steps between checkpoints; 0 writes none."""
    keep: int = 2
    """Complete checkpoints to keep."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of matrix products (weights and sums stay fp32); auto: bfloat16 where the hardware has it."""
    threads: int = 0
    """CPU threads; 0: all cores."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: ddp keeps the whole model on every rank, fsdp shards it (FSDP2)."""
    offload: bool = False
    """With --parallel fsdp: weights, gradients and optimizer state stay in host memory, layers visit the GPU."""
    compile: bool = False
    """Compile the decoder with torch.compile; it is compiled again after every physical removal."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl."""
    wandb: bool = False
    """Log to Weights & Biases, where it is installed and configured."""
    seed: int = 0
    """Seed of the data order and of random initialisation."""

    def __post_init__(self) -> None:
        _require(not (self.overwrite and self.resume), "resume", "", "cannot be combined with --overwrite")
        _require(not self.offload or self.parallel == "fsdp", "offload", "", "works with --parallel fsdp only")
        _require(self.checkpoint_every >= 0, "checkpoint_every", self.checkpoint_every, "must not be negative")
        _require(self.keep >= 1, "keep", self.keep, "must be at least 1")
        _require(self.threads >= 0, "threads", self.threads, "must not be negative")


@dataclass(frozen=True)
class TrainConfig:
    """Everything `efficientllm-train` can be told."""

    source: SourceConfig = field(default_factory=SourceConfig)
    pruning: PruneConfig = field(default_factory=PruneConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_toml(self) -> str:
        """The configuration as TOML that `--config` reads back; unset values are left out."""
        lines: list[str] = []
        for section, values in flags.flatten(self).items():
            lines.append(f"[{section}]")
            # JSON scalars and arrays of strings are valid TOML values
            lines += [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]
            lines.append("")
        return "\n".join(lines)


RESUMABLE_CHANGES = frozenset(
    {"output", "overwrite", "resume", "checkpoint_every", "keep", "device", "threads", "tensorboard", "wandb"}
)
"""Settings a resumed run may change without changing its result."""


def changed_settings(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Flags whose values differ and would change the result of a resumed run."""
    changed = []
    for section in fields(TrainConfig):
        old, new = getattr(before, section.name), getattr(after, section.name)
        changed += [
            flags.flag_name(item.name)
            for item in fields(old)
            if item.name not in RESUMABLE_CHANGES and getattr(old, item.name) != getattr(new, item.name)
        ]
    return changed
