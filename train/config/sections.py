"""Configuration of a training run: one frozen dataclass per section, every field a flag. Imports no torch."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ...runtime.base import flags
from ..model.foreign_configs import ImportOptions
from ..model.target_rules import TARGETS
from .pruning import PruneConfig


@dataclass(frozen=True)
class SourceConfig:
    """Source model and text."""

    source: str = "demo"
    """Model to start from: a Hugging Face folder or hub id, a .gguf file, or 'demo' (SmolLM2-135M-Instruct)."""
    data: tuple[str, ...] = ("demo",)
    """Training text, PATH[:WEIGHT], repeatable: .txt, .jsonl, .json, .csv (each also .gz or .zst), .parquet, a folder
    of them, a hub dataset id (owner/name[@config]), 'demo' (Wikipedia lead sections) or 'self-chat' (chats sampled from
    the source). Records with "messages" instead of text are chats: they use the source's chat template, and only the
    answers and ends of turns are learned. FILE@JOB[:WEIGHT] names the job of its chats, for several in one model."""
    text_field: str = "text"
    """Field (of JSON) or column (of .csv, .parquet and hub datasets) with the text."""
    skip_bad_lines: int = flags.number(0, at_least=0)
    """Malformed lines of each corpus that may be skipped. One more ends the run."""
    held_out_fraction: float = flags.number(0.05, above=0, below=1)
    """Share of the documents, chosen by hash, that is never trained on and measures perplexity."""
    eval_tokens: int = flags.count(16_384, at_least=1)
    """Held-out tokens per evaluation."""
    init: Literal["source", "random"] = "source"
    """random: train the source's shape from scratch, as a baseline."""
    chat_template: str = ""
    """File with a chat template (Jinja) of the job's own instead of the source's. It may render of a long context what
    the model needs. The model, its exports and the server keep it."""
    functions: Literal["described", "learned"] = "described"
    """learned: leave the descriptions of functions out of prompts, because the model is trained on its functions. Its
    chat template says so, and its calls are one line of JSON."""
    sequence_length: int = flags.count(512, at_least=8)
    """Tokens per training sequence."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        flags.require(self, "source", bool(self.source), "is empty; name a model")
        flags.require(self, "data", all(self.data), "give a file, a folder or a hub dataset")
        flags.require(self, "text_field", bool(self.text_field), "is empty; name a field")


SLOWEST_BFLOAT16_DECAY = 0.98
"""A bf16 number has 8 bits, so a change of less than 1/512 is rounded away. A moment with decay b moves by (1 - b) of
the distance to its input. It may therefore stay off by 1/512 / (1 - b) of that distance, a tenth here."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimisation."""

    tokens: int = flags.count(1_000_000, at_least=1)
    """Training tokens in total."""
    batch_size: int = flags.number(4, at_least=1)
    """Sequences per microbatch and process."""
    gradient_accumulation: int = flags.number(1, at_least=1)
    """Microbatches per optimizer step."""
    learning_rate: float = flags.number(2e-4, above=0, below=math.inf)
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warm-up, stable, linear decay; cosine; constant."""
    lr_warmup: float = flags.number(0.05, at_least=0, at_most=1)
    """Share of the tokens for the linear warm-up."""
    lr_decay: float = flags.number(0.3, at_least=0, at_most=1)
    """Share of the tokens for wsd's final decay."""
    lr_floor: float = flags.number(0.1, at_least=0, at_most=1)
    """Final learning rate as a share of the peak."""
    weight_decay: float = flags.number(0.01, at_least=0, below=math.inf)
    """AdamW's decoupled weight decay, on matrices only."""
    beta1: float = flags.number(0.9, at_least=0, below=1)
    """Decay of AdamW's first moment."""
    beta2: float = flags.number(0.95, at_least=0, below=1)
    """Decay of AdamW's second moment."""
    optimizer_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of AdamW's stored moments; bfloat16 saves 4 bytes a parameter. Updates are computed in float32."""
    max_grad_norm: float = flags.number(1.0, above=0)
    """Gradients are clipped to this global norm."""
    distill: float = flags.number(0.0, at_least=0, below=math.inf)
    """Weight of the KL divergence from the teacher's predictions, added to the loss. 0: off."""
    teacher: str = "source"
    """Teacher of --distill: source (before pruning), or a model with the same tokenizer, named like a --source."""
    cross_entropy: float = flags.number(1.0, at_least=0, below=math.inf)
    """Weight of the next-token cross-entropy; 0 for distillation only. At least 1 counts while groups are ranked by
    gradients."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        for name in ("beta1", "beta2") if self.optimizer_dtype == "bfloat16" else ():
            is_followed = getattr(self, name) <= SLOWEST_BFLOAT16_DECAY
            flags.require(
                self, name, is_followed, f"must be at most {SLOWEST_BFLOAT16_DECAY} with --optimizer-dtype bfloat16"
            )
        has_loss = self.cross_entropy > 0 or self.distill > 0
        flags.require(self, "cross_entropy", has_loss, "nothing is trained; raise it or --distill")
        if self.teacher != "source":
            flags.require(self, "teacher", self.distill > 0, "needs distillation; add --distill 1")


@dataclass(frozen=True)
class RunConfig:
    """Run."""

    output: str = ""
    """Folder of the run: checkpoints, metrics and the final model."""
    overwrite: bool = False
    """Start a new run. The run in --output is deleted when the new one writes its first checkpoint or its model."""
    resume: bool = False
    """Continue from the last complete checkpoint in --output."""
    branch_of: str = flags.internal("")
    """Folder of the run with --sizes that this run finishes a larger size of, from --output."""
    started_in: str = flags.internal("")
    """Folder that relative paths of the settings are in, from --output."""
    resume_or_start: bool = False
    """--resume if --output holds a run, otherwise start one. A finished run stays as it is. For jobs that a scheduler
    starts again with the same command."""
    checkpoint_every: int = flags.number(200, at_least=0)
    """Optimizer steps between checkpoints. 0: only after the last step and when a signal stops the run."""
    eval_every: int = flags.number(0, at_least=0)
    """Optimizer steps between measurements of the held-out loss. 0: none."""
    keep: int = flags.number(2, at_least=1)
    """Complete checkpoints to keep."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the stored final model; auto: the source's (bfloat16 for a quantised GGUF file)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of matrix products (weights and sums stay fp32); auto: bfloat16 if the hardware supports it."""
    threads: int = flags.number(0, at_least=0, at_most=1024)
    """CPU threads. 0: all cores."""
    data_parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: ddp keeps the whole model on every rank, fsdp shards it (FSDP2)."""
    offload: bool = False
    """With --data-parallel fsdp: keep weights, gradients and optimizer state in host memory, not on the GPU."""
    reduce_once: bool = False
    """With --data-parallel fsdp: average the gradients of a step once instead of after every microbatch. This sends
    less and takes 4 bytes a parameter more on every GPU."""
    compile: bool = False
    """Compile the decoder with torch.compile, again after every physical removal."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    quality: bool = True
    """Measure source and final model on texts, chats and questions that no run trains on (see efficientllm-eval)."""
    for_: tuple[str, ...] = flags.comma_separated()
    """Export targets, comma-separated, that must be able to hold the final model: gguf, web, onnx, executorch,
    hf-uniform. A model that one of them cannot hold is refused before it is trained."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl."""
    seed: int = flags.number(0, at_least=0, below=2**63)
    """Seed of the data order and of random initialisation."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        check_device(self)
        for target in self.for_:
            flags.require(self, "for_", target in TARGETS, f"choose from {', '.join(TARGETS)}", value=target)
        for name in ("resume", "resume_or_start"):
            is_alone = not (self.overwrite and getattr(self, name))
            flags.require(self, name, is_alone, "cannot be combined with --overwrite")
        for name in ("offload", "reduce_once"):
            is_sharded = not getattr(self, name) or self.data_parallel == "fsdp"
            flags.require(self, name, is_sharded, "works with --data-parallel fsdp only")


GGUF_TYPES = ("q8_0", "q4_0")
"""Values of --qat for llama.cpp's files."""
QAT_TARGETS = dict.fromkeys(GGUF_TYPES, "gguf") | {"int4-block32": "onnx", "8da4w": "executorch"}
"""--qat -> export target of the files."""


@dataclass(frozen=True)
class QuantisationConfig:
    """Quantisation-aware training."""

    qat: Literal["none", "q8_0", "q4_0", "int4-block32", "8da4w"] = "none"
    """Train on the grid of a file type: q8_0 and q4_0 of GGUF, int4-block32 of ONNX (--quantize int4), 8da4w of
    ExecuTorch. Forward and backward use the rounded weights, the unrounded ones are updated, and the final model has
    the grid's values, which the export keeps to the bit."""
    qat_start: float = flags.number(0.0, at_least=0, below=1)
    """Share of the tokens before quantisation-aware training starts."""
    qat_head: Literal["same", "q8_0", "q4_0"] = "same"
    """Type of token embedding and LM head in a GGUF: same as --qat, or more bits (llama.cpp keeps them at q8_0)."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        flags.require(self, "qat_start", not self.qat_start or self.is_on, "needs --qat; give a type")
        is_known = self.qat_head == "same" or self.qat in GGUF_TYPES
        flags.require(self, "qat_head", is_known, f"needs --qat {', '.join(GGUF_TYPES)}")

    @property
    def is_on(self) -> bool:
        """Return True if the run trains on a grid."""
        return self.qat != "none"

    @property
    def head_type(self) -> str:
        """Return the type of embedding and head in a GGUF."""
        return self.qat if self.qat_head == "same" else self.qat_head

    @property
    def export_format(self) -> tuple[str, str]:
        """Return (engine of such a file, the engine's name of the type)."""
        engine = {"gguf": "llama.cpp", "onnx": "onnxruntime", "executorch": "executorch"}[QAT_TARGETS[self.qat]]
        return engine, self.qat.removesuffix("-block32")

    def to_dict(self) -> dict[str, str]:
        """Return the fields of training.json for the exporters; export/checkpoint.py reads them."""
        return {"type": self.qat, "head": self.head_type, "target": QAT_TARGETS[self.qat]}


def check_device(options: Any) -> None:
    """Raise OptionError unless the field `device` of `options` is the name of a device."""
    is_name = re.fullmatch(r"auto|cpu|cuda(:\d+)?", options.device)
    flags.require(options, "device", is_name is not None, "not a device; use auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class ScoreConfig:
    """Score of a job."""

    task: str = ""
    """Held-out examples of a job, .jsonl or .jsonl.gz of chats (see efficientllm-eval). They are scored before every
    removal and at the end."""
    metric: str = "exact"
    """Metric of the score, as of efficientllm-eval."""
    task_limit: int = flags.number(200, at_least=0)
    """Scored examples. 0: all."""
    task_tokens: int = flags.number(128, at_least=1)
    """Longest answer."""
    keep_score: float | None = flags.number(None, above=0, at_most=1)
    """Share of the whole model's score to keep, such as 0.98. Below it the run returns to the size before its last
    removal, and trains that to the end."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        flags.require(self, "keep_score", self.keep_score is None or bool(self.task), "needs examples; add --task")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of `efficientllm-train`."""

    source: SourceConfig = field(default_factory=SourceConfig)
    pruning: PruneConfig = field(default_factory=PruneConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    quantisation: QuantisationConfig = field(default_factory=QuantisationConfig)
    foreign: ImportOptions = field(default_factory=ImportOptions)
    score: ScoreConfig = field(default_factory=ScoreConfig)

    def to_toml(self) -> str:
        """Return the configuration as TOML for `--config`. Unset values are left out."""
        lines: list[str] = []
        for section, values in flags.flatten(self).items():
            lines.append(f"[{section}]")
            lines += [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
            lines.append("")
        return "\n".join(lines)


def _toml(value: object) -> str:
    """Return a TOML value. JSON scalars and arrays of strings are TOML, except infinity and surrogate characters."""
    is_infinite = isinstance(value, float) and not math.isfinite(value)
    return str(value) if is_infinite else json.dumps(value, ensure_ascii=False)


RESUMABLE_CHANGES = frozenset(
    {
        *("output", "overwrite", "resume", "checkpoint_every", "keep", "device", "threads", "tensorboard"),
        *("skip_bad_lines", "eval_every", "save_dtype", "for_", "resume_or_start", "branch_of", "started_in"),
    }
)
"""Settings that a resumed run may change without changing its result."""


STEERING_CHANGES = frozenset({"--learning-rate", "--max-grad-norm"})
"""Flags that a resumed run may change although the result changes, as a remedy for divergence."""


def changed_settings(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Return the flags whose values differ and would change the result of a resumed run."""
    changed = []
    for section in fields(TrainConfig):
        old, new = getattr(before, section.name), getattr(after, section.name)
        changed += [
            flags.flag_name(item.name)
            for item in fields(old)
            if item.name not in RESUMABLE_CHANGES and getattr(old, item.name) != getattr(new, item.name)
        ]
    return changed
