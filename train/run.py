"""A whole training run: check the request, load, train, and leave a model and what is known about it behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..runtime.base import flags
from ..runtime.base.errors import UsageError
from ..runtime.base.files import require_empty, write_text_atomically
from ..runtime.base.quantities import format_bytes, format_count
from .compute.distributed import Parallel
from .compute.hardware import Hardware, choose_hardware
from .compute.loss import TrainingLoss, make_teacher
from .config import TrainConfig, changed_settings
from .data.documents import DataSpec
from .data.packing import PackedStream, held_out_windows
from .model.architecture import Architecture
from .model.file_size import tokenizer_bytes
from .model.irregular import architecture_of, build
from .model.source import load_source
from .pruning.budget import Budget, check_budget, make_budget
from .pruning.pruner import selection_rules
from .pruning.saliency import criterion_named
from .pruning.selection import check_floor
from .result import write_result
from .trainer import Trainer
from .training_state import checkpoint_folders


def run_training(config: TrainConfig) -> Path | None:
    """Train as `config` says; returns the folder of the final model, or None when a signal stopped the run.

    Raises an EfficientLLMError for anything the user can put right, before any work is lost.
    """
    if not config.run.output:
        raise UsageError("--output is missing; name a folder for the run")
    folder = Path(config.run.output)
    criterion_named(config.pruning.saliency)
    require_empty(
        folder, config.run.overwrite or config.run.resume, "give --overwrite to replace it or --resume to continue it"
    )
    last = _resume_point(config, folder)
    hardware = choose_hardware(config.run.device, config.run.dtype, config.run.threads)
    parallel = Parallel(config.run.parallel, hardware.device, config.run.offload)
    try:
        return _run(config, folder, last, hardware, parallel)
    finally:
        parallel.close()


def _run(config: TrainConfig, folder: Path, last: Path | None, hardware: Hardware, parallel: Parallel) -> Path | None:
    if parallel.mode == "fsdp" and config.pruning.compact_every > 1:
        raise UsageError("--compact-every works with --parallel ddp only: fsdp removes physically at every event")
    torch.manual_seed(config.run.seed)
    source, tokenizer = load_source(config.source.source)
    architecture = architecture_of(source.config)
    budget = _budget(config, architecture, tokenizer)
    trainer = _make_trainer(config, source, tokenizer, budget, hardware, parallel, folder, last)
    if parallel.is_main:
        if last is None:
            _prepare_folder(config, folder)
        _announce(config, architecture, budget, trainer, hardware, parallel, last)
    parallel.barrier()
    if not trainer.train():
        return None
    write_result(trainer, architecture, folder)
    return folder / "model"


def _announce(
    config: TrainConfig,
    architecture: Architecture,
    budget: Budget | None,
    trainer: Trainer,
    hardware: Hardware,
    parallel: Parallel,
    last: Path | None,
) -> None:
    ranks = "" if parallel.mode == "none" else f", {parallel.world_size} ranks ({parallel.mode})"
    print(f"source: {config.source.source}, {format_count(architecture.num_parameters)} parameters")
    print(f"device: {hardware.describe()}{ranks}")
    if budget is not None:
        show = format_bytes if budget.unit == "bytes" else format_count
        print(f"target: {show(budget.target)} {budget.unit if budget.unit != 'bytes' else ''}".rstrip())
    if last is not None:
        print(f"resuming from {last.name} at {format_count(trainer.progress.tokens)} tokens")


def _resume_point(config: TrainConfig, folder: Path) -> Path | None:
    """The checkpoint to continue from; None for a new run. A run killed before its first checkpoint starts anew."""
    if not config.run.resume:
        return None
    settings = folder / "config.toml"
    if not settings.is_file():
        raise UsageError(f"--resume: {folder} holds no run (no config.toml)")
    before = flags.merge(TrainConfig(), flags.read_toml(settings.read_text(encoding="utf-8")), str(settings))
    changed = changed_settings(before, config)
    if changed:
        raise UsageError(f"--resume: {', '.join(changed)} differ from the run in {folder}; repeat its settings")
    if (folder / "model").is_dir():
        raise UsageError(f"--resume: the run in {folder} is finished; its model is {folder / 'model'}")
    folders = checkpoint_folders(folder / "checkpoints")
    return folders[-1] if folders else None


def _prepare_folder(config: TrainConfig, folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    kept = replace(config, run=replace(config.run, overwrite=False, resume=False))
    write_text_atomically(folder / "config.toml", kept.to_toml())


def _budget(config: TrainConfig, source: Architecture, tokenizer: PreTrainedTokenizerBase) -> Budget | None:
    """The budget, checked against the source before anything is written."""
    vocabulary_bytes = _vocabulary_bytes(tokenizer) if config.pruning.target_bytes is not None else 0
    budget = make_budget(config.pruning, source, vocabulary_bytes)
    if budget is None:
        return None
    rules = selection_rules(config.pruning)
    if rules.floor is not None:
        check_floor(source, rules.floor)
    if rules.uniform and not source.is_uniform:
        raise UsageError("--layout uniform needs a source whose layers are equal")
    check_budget(budget, source, rules)
    return budget


def _vocabulary_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of the tokenizer in an exported file."""
    backend: Any = tokenizer.backend_tokenizer
    merges = json.loads(backend.to_str())["model"].get("merges", [])
    texts = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return tokenizer_bytes(list(tokenizer.get_vocab()), texts)


def _make_trainer(
    config: TrainConfig,
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    budget: Budget | None,
    hardware: Hardware,
    parallel: Parallel,
    folder: Path,
    last: Path | None,
) -> Trainer:
    specs = [DataSpec.parse(text) for text in config.source.data]
    length, fraction = config.source.sequence_length, config.source.held_out_fraction
    if length > source.config.max_position_embeddings:
        raise UsageError(
            f"--sequence-length {length}: the source's context is {source.config.max_position_embeddings} tokens"
        )
    held_out = held_out_windows(specs, tokenizer, length, fraction, config.source.eval_tokens)
    stream = PackedStream(specs, tokenizer, length, fraction, config.run.seed)
    stream.check()
    architecture = architecture_of(source.config)
    teacher = None
    if config.optimizer.distill:
        teacher = make_teacher(source, hardware.dtype, parallel.device)
    model = source
    if last is not None:
        saved = AutoConfig.from_pretrained(last)
        model = build(saved, architecture_of(saved))
    elif config.source.init == "random":
        model = build(source.config, architecture)
    model.generation_config = source.generation_config
    loss = TrainingLoss(
        model.to(parallel.device), hardware.dtype, teacher, config.optimizer.distill, config.optimizer.cross_entropy
    )
    trainer = Trainer(config, loss, tokenizer, stream, held_out, budget, parallel, folder, architecture)
    if last is not None:
        trainer.restore(last)
    return trainer
