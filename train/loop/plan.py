"""Resolve a training run: everything that follows from its configuration, once before training."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...runtime.base.errors import ModelError, UsageError
from ...runtime.base.progress import ProgressDisplay
from ...runtime.chat_template import read_template_file
from ..checkpoint import state as training_state
from ..checkpoint.run_folder import FINISHED_FILE, foreign_files, is_finished, newest_sound_checkpoint, saved_config
from ..compute.distributed import Parallel
from ..compute.hardware import Hardware, choose_hardware
from ..compute.loss import frozen_copy
from ..config.sections import STEERING_CHANGES, OptimizerConfig, TrainConfig, changed_settings
from ..data.chat import ChatFormat, check_jobs, set_chat_template
from ..data.documents import SELF_CHAT, DataSpec
from ..data.self_chat import MAX_TOKENS, MIN_SEQUENCES, self_chat_file
from ..model.architecture import Architecture
from ..model.file_types import tokenizer_bytes
from ..model.foreign_configs import known_shape
from ..model.irregular import architecture_of
from ..model.source import stored_dtype
from ..model.target_rules import check_target
from ..pruning.plan import PruningPlan, make_pruning_plan
from ..vocabulary.pieces import pieces_of
from .memory import check_memory, device_memory, training_memory
from .request import check_removals, check_shape, data_specs, pruning_settings
from .shards import load_for_ranks

_log = logging.getLogger("efficientllm.train")

MANY_COMPILATIONS = 20
"""Removals of a run with --compile above which it warns, as each may compile for minutes."""


def with_self_chats(
    config: TrainConfig, source: Any, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, parallel: Parallel
) -> tuple[DataSpec, ...]:
    """Return the corpora, with self-chats (sampled in `dtype`) as the file that stores them."""
    specs = data_specs(config)
    shares = [spec.weight for spec in specs if spec.path == SELF_CHAT]
    if not shares:
        return specs
    wanted = round(config.optimizer.tokens * sum(shares) / sum(spec.weight for spec in specs))
    tokens = min(MAX_TOKENS, max(wanted, MIN_SEQUENCES * config.source.sequence_length))
    with ProgressDisplay(silent=not parallel.is_main) as display:

        def sample() -> Path:
            report = partial(display.update, "sampling the source's chats")
            load_model = partial(frozen_copy, source, dtype, parallel.device)
            return self_chat_file(source, load_model, tokenizer, tokens, config.run.seed, report)

        parallel.together(sample, only_main=True)  # the others then read its file
        path = parallel.together(sample)
    return tuple(replace(spec, path=str(path)) if spec.path == SELF_CHAT else spec for spec in specs)


@dataclass(frozen=True)
class ResumePoint:
    """Checkpoint to resume from."""

    checkpoint: Path
    damaged: dict[Path, str]
    """Newer checkpoints that cannot be used, with the reason."""
    changed: tuple[str, ...]
    """Changed flags that a resumed run may change."""


@dataclass(frozen=True)
class Compute:
    """Hardware and rank of the run."""

    hardware: Hardware
    parallel: Parallel

    def stores_gradients_as_computed(self, settings: OptimizerConfig) -> bool:
        """Tell whether the layers' gradients stay in bf16. Sums over microbatches or ranks are fp32."""
        is_one_pass = self.parallel.mode == "none" and settings.gradient_accumulation == 1
        return is_one_pass and self.hardware.dtype == torch.bfloat16


@dataclass(frozen=True)
class RunPlan:
    """Resolved properties of a run. It does not hold the source's weights, because they are trained."""

    config: TrainConfig
    folder: Path
    """Folder of the run."""
    resume: ResumePoint | None
    """None for a new run."""
    compute: Compute
    architecture: Architecture
    """Shape of the source."""
    tokenizer: PreTrainedTokenizerBase
    data: tuple[DataSpec, ...]
    pruning: PruningPlan | None
    """None for a run without pruning."""
    save_dtype: torch.dtype
    """Type of the final model's weights."""
    weights: Path | None
    """Folder of a source on the meta device, whose rows the ranks read after sharding. None: the source is whole."""


def find_resume_point(config: TrainConfig) -> ResumePoint | None:
    """Return the checkpoint of --resume, or None for a new run, or one without a checkpoint yet."""
    if not config.run.resume:
        return None
    folder, changed = Path(config.run.output), allowed_changes(config)
    if is_finished(folder):
        raise UsageError(f"--resume: the run in {folder} is finished; its model is {folder / 'model'}")
    checkpoint, damaged = newest_sound_checkpoint(folder / "checkpoints")
    if checkpoint is not None:
        return ResumePoint(checkpoint, damaged, tuple(changed))
    if damaged:
        newest, reason = next(iter(damaged.items()))
        raise UsageError(
            f"--resume: no checkpoint in {folder} can be used ({newest.name}: {reason}); --overwrite starts a new run"
        )
    if (folder / "model").is_dir():
        raise UsageError(
            f"--resume: {folder} holds a model that was not measured and no checkpoint; measure it with "
            f"efficientllm-eval {folder / 'model'}, or give --overwrite to start a new run"
        )
    if (folder / FINISHED_FILE).is_file():
        raise UsageError(
            f"--resume: the run in {folder} is finished, and its model was moved away; --overwrite starts a new run"
        )
    others = foreign_files(folder)
    if others:
        raise UsageError(f"--resume: {folder} has no checkpoint and holds {others[0]}; --overwrite starts a new run")
    _log.info("no checkpoint was written yet: the run starts again")
    return None


def allowed_changes(config: TrainConfig) -> list[str]:
    """Return the flags that differ from the run to resume. Raises UsageError if one of them may not."""
    folder = Path(config.run.output)
    changed = changed_settings(saved_config(folder), config)
    fixed = [name for name in changed if name not in STEERING_CHANGES]
    if fixed:
        raise UsageError(
            f"--resume: {', '.join(fixed)} differ from the run in {folder}; omit them, or give the run's values"
        )
    return changed


def choose_compute(config: TrainConfig) -> Compute:
    """Return hardware and process group. `compute.parallel.close()` leaves the group."""
    run = config.run
    hardware = choose_hardware(run.device, run.dtype, run.threads)
    return Compute(hardware, Parallel(run.data_parallel, hardware.device, run.offload, run.reduce_once))


def make_plan(config: TrainConfig, resume: ResumePoint | None, compute: Compute) -> tuple[RunPlan, Any]:
    """Return (the plan, the loaded source model). Raises UsageError or ModelError if it cannot be trained."""
    if compute.parallel.world_size > 1 and config.score.task:
        raise UsageError("--task works on one process: the others would wait for the answers; omit it")
    if compute.parallel.world_size > 1 and config.pruning.sizes:
        raise UsageError("--sizes works on one process: its branches are finished one after the other; omit it")
    _warn_of_compilations(config, compute)
    if resume is not None:
        _check_ranks(resume, compute.parallel)
    known = known_shape(config.source.source)
    if known is not None:  # before it is read, as it may not fit
        _announce_memory(config, resume, compute, known[0])
    source, tokenizer, weights = load_for_ranks(config, compute.parallel, config.source.source)
    settings = config.source
    template = read_template_file(settings.chat_template) if settings.chat_template else ""
    set_chat_template(tokenizer, template, settings.functions == "learned")
    check_jobs(ChatFormat.of_tokenizer(tokenizer), {spec.job for spec in data_specs(config)})
    architecture = architecture_of(source.config)
    if known is None:
        _announce_memory(config, resume, compute, architecture)
    _check_targets(config, source.config.to_dict(), architecture)
    check_shape(config, architecture, source.config.max_position_embeddings)
    counts_bytes = config.pruning.of_smallest_size.target_bytes is not None
    vocabulary_bytes = tokenizer_bytes(tokenizer) if counts_bytes else 0
    pieces = pieces_of(source, tokenizer) if config.pruning.prunes_vocabulary and config.pruning.prunes else None
    pruning = make_pruning_plan(pruning_settings(config), architecture, vocabulary_bytes, pieces)
    data = with_self_chats(config, source, tokenizer, compute.hardware.dtype, compute.parallel)
    folder, dtype = Path(config.run.output), _save_dtype(config)
    return RunPlan(config, folder, resume, compute, architecture, tokenizer, data, pruning, dtype, weights), source


def _warn_of_compilations(config: TrainConfig, compute: Compute) -> None:
    """Warn of many removals with --compile."""
    removals = check_removals(config)
    if config.run.compile and removals > MANY_COMPILATIONS and compute.parallel.is_main:
        _log.warning(f"--compile: up to {removals} removals, and each compiles the model again; add --removals 4")


def _check_ranks(resume: ResumePoint, parallel: Parallel) -> None:
    """Raise UsageError if a run is resumed on another number of ranks, which would change the batch of a step."""
    _, saved = training_state.read_trainer_json(resume.checkpoint)
    before, now = saved["ranks"], parallel.world_size
    if before != now:
        raise UsageError(
            f"--resume: the run has {before} ranks, not {now}; start as many (torchrun --nnodes, --nproc-per-node)"
        )


def _check_targets(config: TrainConfig, source: dict[str, Any], architecture: Architecture) -> None:
    """Raise UsageError if a target of --for cannot hold the final model."""
    settings = config.pruning
    is_irregular = settings.prunes and settings.layout == "per-layer"
    for target in config.run.for_:
        try:
            check_target(target, source, architecture, is_irregular)
        except ModelError as error:
            raise UsageError(f"--for {error}") from error


def _save_dtype(config: TrainConfig) -> torch.dtype:
    """Return the type of the final model. A 16-bit scale times a code does not fit into 16-bit numbers."""
    asked = config.run.save_dtype
    if config.quantisation.is_on:
        if asked not in ("auto", "float32"):
            raise UsageError(f"--save-dtype {asked}: the grid of --qat {config.quantisation.qat} needs float32")
        return torch.float32
    return stored_dtype(config.source.source) if asked == "auto" else getattr(torch, asked)


def _announce_memory(config: TrainConfig, resume: ResumePoint | None, compute: Compute, source: Architecture) -> None:
    """Report the memory of a run from a source of this shape. Raises UsageError if the machine has too little."""
    architecture = source if resume is None else Architecture.from_folder(resume.checkpoint)
    parallel = compute.parallel
    keeps_bf16 = compute.stores_gradients_as_computed(config.optimizer)
    shards = parallel.world_size if parallel.mode == "fsdp" else 1
    needed = training_memory(config, architecture, compute.hardware.dtype, shards, keeps_bf16)
    memory = device_memory(parallel.storage_device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    warning = check_memory(needed, memory, config) if memory is not None else ""
    if parallel.is_main:
        _log.info(f"memory: {needed.describe()}")
        if warning:
            _log.warning(f"memory: {warning}")
