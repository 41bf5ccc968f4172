"""A whole training run: plan it, train, and leave a model and what is known about it behind."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..runtime.base.files import write_text_atomically
from ..runtime.base.output import locked_output
from ..runtime.base.quantities import format_count
from ..runtime.engines.memory import give_back_freed_memory
from .compute.loss import LossWeights, TrainingLoss, make_teacher
from .config import TrainConfig
from .data.packing import PackedStream, held_out_windows
from .model.irregular import architecture_of, build
from .plan import RunPlan, check_request, choose_compute, find_resume_point, make_plan
from .result import write_result
from .run_folder import DAMAGED_PREFIX, empty_run_folder, set_aside
from .trainer import Trainer

_log = logging.getLogger("efficientllm.train")


def run_training(config: TrainConfig) -> Path | None:
    """Train as `config` says; returns the folder of the final model, or None when a signal stopped the run.

    Raises an EfficientLLMError for anything the user can put right, before any work is lost.
    """
    check_request(config)
    is_main = os.environ.get("RANK", "0") == "0"  # of torchrun; the others write under its lock
    with locked_output(Path(config.run.output)) if is_main else contextlib.nullcontext():
        check_request(config)  # again: another run may have ended since
        resume = find_resume_point(config)
        compute = choose_compute(config)
        try:
            torch.manual_seed(config.run.seed)
            plan, source = make_plan(config, resume, compute)
            trainer = _make_trainer(plan, source)
            del source  # trained in place, or replaced by the checkpoint's model
            return _run(plan, trainer)
        finally:
            compute.parallel.close()


def _run(plan: RunPlan, trainer: Trainer) -> Path | None:
    parallel = plan.compute.parallel
    if parallel.is_main:
        _prepare_folder(plan)
        _announce(plan, trainer.progress.tokens)
    parallel.barrier()
    if not trainer.train():
        return None
    write_result(trainer)
    return plan.folder / "model"


def _announce(plan: RunPlan, tokens: int) -> None:
    parallel, source = plan.compute.parallel, plan.config.source.source
    ranks = "" if parallel.mode == "none" else f", {parallel.world_size} ranks ({parallel.mode})"
    _log.info(f"source: {source}, {format_count(plan.architecture.num_parameters)} parameters")
    _log.info(f"device: {plan.compute.hardware.describe()}{ranks}")
    if plan.pruning is not None:
        _log.info(f"target: {plan.pruning.budget.describe()}")
    if plan.resume is not None:
        for checkpoint, reason in plan.resume.damaged.items():
            _log.info(f"{checkpoint.name} is damaged ({reason}); it is kept as {DAMAGED_PREFIX}{checkpoint.name}")
        _log.info(f"resuming from {plan.resume.checkpoint.name} at {format_count(tokens)} tokens")
        for flag in plan.resume.changed:
            _log.info(f"{flag} is not what it was; the result is not that of the uninterrupted run")


def _prepare_folder(plan: RunPlan) -> None:
    """Empty a new run's folder, put a resumed one's damaged checkpoints aside; note the settings."""
    if plan.resume is None:
        empty_run_folder(plan.folder)
    else:
        for checkpoint in plan.resume.damaged:
            set_aside(checkpoint)
    kept = replace(plan.config, run=replace(plan.config.run, overwrite=False, resume=False))
    write_text_atomically(plan.folder / "config.toml", kept.to_toml())


def _make_trainer(plan: RunPlan, source: Any) -> Trainer:
    """The trainer of a loaded source, continued from the plan's checkpoint where it has one."""
    settings, optimizer, dtype = plan.config.source, plan.config.optimizer, plan.compute.hardware.dtype
    length, fraction, device = settings.sequence_length, settings.held_out_fraction, plan.compute.parallel.device
    held_out = held_out_windows(plan.data, plan.tokenizer, length, fraction, settings.eval_tokens)
    stream = PackedStream(plan.data, plan.tokenizer, length, fraction, plan.config.run.seed)
    stream.check()
    teacher = make_teacher(source, dtype, device) if optimizer.distill else None
    weights = LossWeights(optimizer.cross_entropy, optimizer.distill)
    loss = TrainingLoss(_make_model(plan, source).to(device), dtype, weights, teacher)
    trainer = Trainer(plan, loss, stream, held_out)
    if plan.resume is not None:
        trainer.restore(plan.resume.checkpoint)
    give_back_freed_memory()  # of reading: gradients do not fit there
    return trainer


def _make_model(plan: RunPlan, source: Any) -> Any:
    """What is trained: the source itself, its shape with new weights, or the shape that a checkpoint had."""
    model = source
    if plan.resume is not None or plan.config.source.init == "random":
        source.to("meta")  # others still hold it; its weights go
    if plan.resume is not None:
        saved = AutoConfig.from_pretrained(plan.resume.checkpoint)
        model = build(saved, architecture_of(saved))
    elif plan.config.source.init == "random":
        model = build(source.config, plan.architecture)
    model.generation_config = source.generation_config
    return model
