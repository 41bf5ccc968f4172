"""A training run resolved: everything that follows from its configuration, settled once before training."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..runtime.base import flags
from ..runtime.base.errors import UsageError
from ..runtime.base.output import check_output
from .compute.distributed import Parallel
from .compute.hardware import Hardware, choose_hardware
from .config import STEERING_CHANGES, TrainConfig, changed_settings
from .data.documents import DataSpec
from .model.architecture import Architecture
from .model.file_size import tokenizer_bytes
from .model.irregular import architecture_of
from .model.source import load_source
from .pruning.criteria import check_saliency
from .pruning.plan import PruningPlan, make_pruning_plan
from .run_folder import foreign_files, newest_sound_checkpoint

_log = logging.getLogger("efficientllm.train")


@dataclass(frozen=True)
class ResumePoint:
    """Where an interrupted run goes on."""

    checkpoint: Path
    damaged: dict[Path, str]
    """Newer checkpoints that cannot be used, with the reason."""
    changed: tuple[str, ...]
    """Flags that differ from the interrupted run's and may."""


@dataclass(frozen=True)
class Compute:
    """What the run computes on, and where this process stands among the others."""

    hardware: Hardware
    parallel: Parallel


@dataclass(frozen=True)
class RunPlan:
    """What Trainer, Pruner and the announcement go by. It does not hold the source's weights: they are trained."""

    config: TrainConfig
    folder: Path
    """Of the run."""
    resume: ResumePoint | None
    """None for a new run."""
    compute: Compute
    architecture: Architecture
    """Of the source."""
    tokenizer: PreTrainedTokenizerBase
    data: tuple[DataSpec, ...]
    pruning: PruningPlan | None
    """None for a run that only trains."""

    @property
    def stores_gradients_as_computed(self) -> bool:
        """Whether the layers' gradients can stay in the bf16 that matrix products gave; sums over them are fp32."""
        is_one_pass = self.compute.parallel.mode == "none" and self.config.optimizer.gradient_accumulation == 1
        return is_one_pass and self.compute.hardware.dtype == torch.bfloat16


def check_request(config: TrainConfig) -> None:
    """Refuse what can be refused before anything is loaded."""
    if not config.run.output:
        raise UsageError("--output is missing; name a folder for the run")
    check_saliency(config.pruning.saliency)
    replaceable = config.run.overwrite or config.run.resume
    inputs = [config.source.source, *(DataSpec.parse(text).path for text in config.source.data)]
    inputs += [config.pruning.target_architecture] if config.pruning.target_architecture is not None else []
    remedy = "give --overwrite to replace it or --resume to continue it"
    # a resumed run leaves alone what is not a run's
    foreign = foreign_files if config.run.overwrite else lambda folder: []
    check_output(Path(config.run.output), replaceable, foreign, inputs, remedy)


def find_resume_point(config: TrainConfig) -> ResumePoint | None:
    """Where to go on under --resume; None for a new run, and where the run was killed before its first checkpoint."""
    if not config.run.resume:
        return None
    folder = Path(config.run.output)
    settings = folder / "config.toml"
    if not settings.is_file():
        raise UsageError(f"--resume: {folder} holds no run (no config.toml)")
    try:
        values = flags.read_toml(settings.read_text(encoding="utf-8"))
    except ValueError as error:  # neither UTF-8 nor TOML
        raise UsageError(f"--resume: {settings} is damaged: {error}") from error
    before = flags.merge(TrainConfig(), values, str(settings))
    changed = changed_settings(before, config)
    fixed = [name for name in changed if name not in STEERING_CHANGES]
    if fixed:
        raise UsageError(f"--resume: {', '.join(fixed)} differ from the run in {folder}; repeat its settings")
    if (folder / "model").is_dir():
        raise UsageError(f"--resume: the run in {folder} is finished; its model is {folder / 'model'}")
    checkpoint, damaged = newest_sound_checkpoint(folder / "checkpoints")
    if checkpoint is not None:
        return ResumePoint(checkpoint, damaged, tuple(changed))
    if damaged:
        newest, reason = next(iter(damaged.items()))
        raise UsageError(
            f"--resume: no checkpoint in {folder} can be used ({newest.name}: {reason}); --overwrite begins anew"
        )
    if (folder / "architecture.json").is_file():
        raise UsageError(
            f"--resume: the run in {folder} is finished, its model was moved away; --overwrite begins anew"
        )
    others = foreign_files(folder)
    if others:
        raise UsageError(f"--resume: {folder} has no checkpoint yet and holds {others[0]}; --overwrite begins anew")
    _log.info("no checkpoint was written yet: the run begins anew")
    return None


def choose_compute(config: TrainConfig) -> Compute:
    """Hardware and process group; `compute.parallel.close()` leaves the group again."""
    hardware = choose_hardware(config.run.device, config.run.dtype, config.run.threads)
    return Compute(hardware, Parallel(config.run.parallel, hardware.device, config.run.offload))


def make_plan(config: TrainConfig, resume: ResumePoint | None, compute: Compute) -> tuple[RunPlan, Any]:
    """(the plan, the loaded source model); UsageError or ModelError for what cannot be trained as asked."""
    if compute.parallel.mode == "fsdp" and config.pruning.compact_every > 1:
        raise UsageError("--compact-every works with --parallel ddp only: fsdp removes physically at every event")
    source: Any
    source, tokenizer = load_source(config.source.source)
    length, longest = config.source.sequence_length, source.config.max_position_embeddings
    architecture = architecture_of(source.config)
    vocabulary_bytes = _vocabulary_bytes(tokenizer) if config.pruning.target_bytes is not None else 0
    pruning = make_pruning_plan(config.pruning, architecture, vocabulary_bytes)
    if length > longest:
        raise UsageError(f"--sequence-length {length}: the source's context is {longest} tokens")
    data = tuple(DataSpec.parse(text, config.source.skip_bad_lines) for text in config.source.data)
    folder = Path(config.run.output)
    return RunPlan(config, folder, resume, compute, architecture, tokenizer, data, pruning), source


def _vocabulary_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of the tokenizer in an exported file."""
    backend: Any = tokenizer.backend_tokenizer
    merges = json.loads(backend.to_str())["model"].get("merges", [])
    texts = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return tokenizer_bytes(list(tokenizer.get_vocab()), texts)
