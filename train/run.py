"""Run a whole training: plan, train, and write the model with training.json, architecture.json, card and plots."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ..runtime.base.command import is_main_process
from ..runtime.base.errors import DiskFullError, UsageError
from ..runtime.base.files import folder_written_atomically, write_json_atomically, write_text_atomically
from ..runtime.base.output import locked_output
from ..runtime.base.quantities import display_name, format_count
from ..runtime.engines.memory import trim_heap
from .checkpoint.run_folder import (
    DAMAGED_PREFIX,
    FINISHED_FILE,
    SCORES_FILE,
    SETTINGS_FILE,
    checkpoint_folders,
    clear_run_folder,
    delete_replaced_run,
    drop_checkpoints,
    is_finished,
    recover,
    rename_damaged,
    restore_replaced_run,
    stash_run,
)
from .compute.distributed import full
from .compute.loss import TrainingLoss, frozen_copy
from .config.sections import TrainConfig
from .evaluation.quality.contract import Quality, contract
from .family.later_steps import drop_later_steps, link_later_steps
from .family.sizes import branch_folder, lacks_sizes, members_of, resumed_branch, unfinished_sizes, write_sizes
from .loop.plan import ResumePoint, RunPlan, allowed_changes, choose_compute, find_resume_point, make_plan
from .loop.request import check_request, check_text, with_resume
from .loop.run_text import RunText
from .loop.shards import is_without_memory, load_for_ranks, read_shards, sharded_teacher
from .loop.trainer import Finished, GoBack, Stopped, Trainer
from .model.folder_files import read_json
from .model.irregular import architecture_of, build, save_checkpoint
from .model.source import load_source
from .pruning.pruner import kept_to_json
from .reporting.metrics import read_metrics
from .reporting.model_card import model_card, source_card
from .reporting.plots import plot_architecture, plot_pruning

_log = logging.getLogger("efficientllm.train")

NO_CHATS = (
    "the source is a chat model and the text has no chats: the model may forget to end its turns; "
    "add some, as with --data self-chat:0.3"
)


def run_training(config: TrainConfig) -> Path | None:
    """Train with `config` and return the folder of the final model, or None if a signal stopped the run.

    Raises an EfficientLLMError for anything that the user can correct, before any work is lost.
    """
    config, folder = with_resume(config), Path(config.run.output)
    # a finished run stays as it is for --resume-or-start, and where only the rest of --sizes is missing
    is_left = config.run.resume and is_finished(folder) and (config.run.resume_or_start or lacks_sizes(folder))
    if is_left:
        for flag in allowed_changes(config):
            _log.info(f"{flag} has changed; the run is finished and stays as it is")
    model: Path | None = folder / "model" if is_left else _train(config)
    if model is None or not config.pruning.sizes:
        return model
    for size in unfinished_sizes(folder):
        _log.info(f"size {size}: the run continues in {branch_folder(folder, size)}")
        if _train(resumed_branch(folder, size)) is None:
            return None
    if is_main_process():
        for member in members_of(folder):
            drop_checkpoints(member.folder / "checkpoints")  # left by a run that was killed at its end
            drop_later_steps(member.folder)
    write_sizes(folder)
    _log.info(f"sizes: {folder / 'sizes.md'}")
    return model


def _train(config: TrainConfig) -> Path | None:
    """Train one model and return its folder, or None if a signal stopped the run."""
    with _locked_output_folder(config) if is_main_process() else contextlib.nullcontext():
        folder = Path(config.run.output)
        trunk = folder / config.run.branch_of
        if config.run.resume and config.run.branch_of and is_finished(trunk):
            link_later_steps(trunk, folder)  # of a larger size, also if it is resumed on its own
        compute = choose_compute(config)
        with compute.parallel.joined():
            # one rank reads the checkpoint to verify it
            resume = compute.parallel.together(lambda: find_resume_point(config), only_main=True)
            torch.manual_seed(config.run.seed)
            plan, source = make_plan(config, resume, compute)
            while True:
                trainer = _make_trainer(_with_kept_size(plan), source)
                del source  # trained in place, or replaced by the checkpoint's model
                ended = _run(trainer)
                if not isinstance(ended, GoBack):
                    return folder / "model" if isinstance(ended, Finished) else None
                plan = replace(plan, resume=ResumePoint(ended.checkpoint, {}, ()))
                del trainer
                gc.collect()  # parts of a run refer to each other, and two models may not fit
                source, _ = load_source(config.source.source, "", config.foreign)


def _with_kept_size(plan: RunPlan) -> RunPlan:
    """Return the plan with the size to which its run has returned as the target."""
    path = plan.folder / SCORES_FILE
    if plan.resume is None or plan.pruning is None or not path.is_file():
        return plan
    smallest = read_json(path)["smallest"]
    if smallest is None:  # it may still remove groups
        return plan
    budget = replace(plan.pruning.budget, target=smallest)
    return replace(plan, pruning=replace(plan.pruning, budget=budget))


@contextlib.contextmanager
def _locked_output_folder(config: TrainConfig) -> Iterator[None]:
    """Check and lock the folder of the run. The other processes of torchrun write in it as well."""
    check_request(config)
    check_text(config)
    folder = Path(config.run.output)
    with locked_output(folder):
        recover(folder, config.run.resume)
        check_request(config)  # again: another run may have ended since
        yield


def _run(trainer: Trainer) -> Finished | Stopped | GoBack:
    """Train a model, write its result, and return how the run ended. If it fails, restore the run that it replaces."""
    plan, parallel = trainer.plan, trainer.parallel
    try:
        if parallel.is_main:
            _prepare_folder(plan)
            _announce(plan, trainer.progress.tokens, trainer.model.config._attn_implementation)
            for line in trainer.text.reading_lines(plan.config.optimizer.tokens):
                _log.info(line)
        parallel.barrier()
        ended = trainer.train(partial(write_model, trainer))
        if isinstance(ended, Finished):
            write_result(trainer)
        return ended
    except BaseException as error:
        is_put_back = parallel.is_main and restore_replaced_run(plan.folder)
        if is_put_back:
            _log.info(f"{plan.folder} holds the earlier run again")
        if isinstance(error, DiskFullError):
            checkpoints = [] if is_put_back else checkpoint_folders(plan.folder / "checkpoints")
            remedy = f"--resume from {checkpoints[-1].name}" if checkpoints else "start again"
            raise DiskFullError(error.path, error.reason, f"make room and {remedy}") from error
        raise


def _announce(plan: RunPlan, tokens: int, attention: str) -> None:
    parallel, source = plan.compute.parallel, plan.config.source.source
    ranks = "" if parallel.mode == "none" else f", {parallel.world_size} ranks ({parallel.mode})"
    _log.info(f"source: {source}, {format_count(plan.architecture.num_parameters)} parameters")
    _log.info(f"device: {plan.compute.hardware.describe()}, attention {attention}{ranks}")
    if plan.pruning is not None:
        time = f" for {plan.pruning.time.describe()}" if plan.pruning.time is not None else ""
        _log.info(f"target: {plan.pruning.budget.describe()}{time}")
    if plan.resume is not None:
        for checkpoint, reason in plan.resume.damaged.items():
            _log.info(f"{checkpoint.name} is damaged ({reason}); it is kept as {DAMAGED_PREFIX}{checkpoint.name}")
        _log.info(f"resuming from {plan.resume.checkpoint.name} at {format_count(tokens)} tokens")
        for flag in plan.resume.changed:
            _log.info(f"{flag} has changed; the result is not that of the uninterrupted run")


def _prepare_folder(plan: RunPlan) -> None:
    """Make room for a new run or set damaged checkpoints of a resumed one aside, and write the settings."""
    if plan.resume is None:
        if plan.config.run.overwrite:
            stash_run(plan.folder)
        clear_run_folder(plan.folder)
    else:
        for checkpoint in plan.resume.damaged:
            rename_damaged(checkpoint)
    started_in = os.path.relpath(Path.cwd(), plan.folder.resolve())
    run = replace(plan.config.run, overwrite=False, resume=False, resume_or_start=False, started_in=started_in)
    kept = replace(plan.config, run=run)
    write_text_atomically(plan.folder / SETTINGS_FILE, kept.to_toml())


def _make_trainer(plan: RunPlan, source: Any) -> Trainer:
    """Return the trainer of a loaded source, restored from the plan's checkpoint if there is one."""
    parallel, run, dtype = plan.compute.parallel, plan.config.run, plan.compute.hardware.dtype
    is_on_gpu = parallel.device.type == "cuda"
    text = RunText(plan.data, plan.tokenizer, plan.config.source, run.seed, parallel.world_size, is_on_gpu)
    if parallel.is_main and text.stream.encoder.chat_format is not None and not text.stream.has_chats:
        _log.warning(NO_CHATS)
    teacher = None
    if plan.config.optimizer.distill > 0:
        original, folder = _teacher(plan, source)
        if parallel.mode == "fsdp":
            teacher = sharded_teacher(original, folder, dtype, parallel)
        else:
            teacher = frozen_copy(original, dtype, parallel.device)
    model, read_weights = _make_model(plan, source), None
    if is_without_memory(model):
        folder = plan.weights if plan.resume is None else None
        read_weights = partial(read_shards, folder=folder, device=parallel.storage_device, parallel=parallel)
    else:
        model.to(parallel.device)
    trainer = Trainer(plan, TrainingLoss(model, dtype, teacher=teacher), text, read_weights)
    trim_heap()  # gradients do not fit into the gaps that loading left
    return trainer


def _teacher(plan: RunPlan, source: Any) -> tuple[Any, Path | None]:
    """Return (the source or the model that --teacher names, its folder if it is on the meta device).

    Raises UsageError if its tokens are others.
    """
    name = plan.config.optimizer.teacher
    if name == "source":
        return source, plan.weights
    model, tokenizer, folder = load_for_ranks(plan.config, plan.compute.parallel, name, f"--teacher {name}")
    if tokenizer.get_vocab() != plan.tokenizer.get_vocab() or model.config.vocab_size != source.config.vocab_size:
        raise UsageError(
            f"--teacher {name} has another vocabulary than the source; name a model with the same tokenizer"
        )
    return model, folder


def _make_model(plan: RunPlan, source: Any) -> Any:
    """Return the model to train: the source, its shape with new weights, or the shape of a checkpoint."""
    model = source
    if plan.resume is not None or plan.config.source.init == "random":
        source.to("meta")  # frees its weights, although others still refer to it
    if plan.resume is not None:
        saved = AutoConfig.from_pretrained(plan.resume.checkpoint)
        is_sharded = plan.compute.parallel.mode == "fsdp"
        with torch.device("meta") if is_sharded else contextlib.nullcontext():
            model = build(saved, architecture_of(saved))
    elif plan.config.source.init == "random":
        model = build(source.config, plan.architecture)
    model.generation_config = source.generation_config
    return model


def write_model(trainer: Trainer) -> None:
    """Write the model folder before the model is measured (a collective call)."""
    source, folder = trainer.plan.architecture, trainer.plan.folder
    state = stored_weights(trainer.model, trainer.plan.save_dtype, trainer.parallel.is_main)
    if trainer.parallel.is_main:
        delete_replaced_run(folder)
        plot_architecture(source, trainer.architecture, folder / "architecture.png")
        with folder_written_atomically(folder / "model") as temporary:
            save_checkpoint(trainer.model, trainer.text.tokenizer, temporary, state)
            shutil.copy(folder / "architecture.png", temporary / "architecture.png")
            _describe(trainer, temporary)
    trainer.parallel.barrier()


def write_result(trainer: Trainer) -> None:
    """Add the measurements and the plots to the written model, then delete the checkpoints (a collective call)."""
    source, folder = trainer.plan.architecture, trainer.plan.folder
    if trainer.parallel.is_main:
        description: dict[str, Any] = {"source": source.to_dict(), "final": trainer.architecture.to_dict()}
        if trainer.pruner is not None:
            description["survivors"] = kept_to_json(trainer.pruner.survivors, source)
            plot_pruning(read_metrics(folder), source, folder / "pruning.png")
        _describe(trainer, folder / "model")
        write_json_atomically(folder / FINISHED_FILE, description)  # last: it says that the run is finished
        drop_checkpoints(folder / "checkpoints")
    trainer.parallel.barrier()


def _describe(trainer: Trainer, model: Path) -> None:
    """Write the files of a model folder that describe its training and measurements."""
    summary = training_summary(trainer)
    if trainer.progress.quality:
        write_text_atomically(model / "quality.json", json.dumps(trainer.progress.quality) + "\n")
    write_text_atomically(model / "training.json", json.dumps(summary, indent=2) + "\n")
    card = model_card(trainer.config, summary, trainer.plan.architecture, trainer.architecture)
    write_text_atomically(model / "README.md", card)


def stored_weights(model: Any, dtype: torch.dtype, keeps: bool = True) -> dict[str, Tensor]:
    """Return {name: whole tensor} of the final model, with a tied head once (a collective call).

    The type is `dtype`, or fp32 if a number exceeds it. A rank that `keeps` nothing returns {}.
    """
    weights: dict[str, Tensor] = {}
    beyond = None
    for name, parameter in model.named_parameters():
        # collective, so a rank that keeps nothing takes part as well
        weight = full(parameter.detach()).to(dtype)
        if beyond is None and not torch.isfinite(weight).all():  # fp16 ends at 65504
            beyond = name
        if keeps:
            weights[name] = weight
    if beyond is None or dtype == torch.float32:
        return weights
    _log.warning(f"{beyond} has numbers beyond {str(dtype).removeprefix('torch.')}: the model is stored in float32")
    return stored_weights(model, torch.float32, keeps)


def training_summary(trainer: Trainer) -> dict[str, Any]:
    """Return the contents of training.json, which exporters copy into their manifests."""
    measured = {name: Quality(**values) for name, values in trainer.progress.quality.items()}
    source, settings = display_name(trainer.config.source.source), trainer.config.pruning
    is_counted = settings.target_bytes is not None and bool(settings.quantize) and trainer.rounding is None
    return {
        "source": source,
        **asdict(source_card(trainer.config.source.source)),
        "data": [display_name(each) for each in trainer.config.source.data],
        "job_names": sorted({spec.job for spec in trainer.plan.data} - {""}),
        "tokens": trainer.progress.tokens,
        "seconds": round(trainer.progress.seconds, 1),
        "source_parameters": trainer.plan.architecture.num_parameters,
        "parameters": trainer.architecture.num_parameters,
        **_latency(trainer),
        "held_out_tokens": int(trainer.text.held_out.shape[0] * trainer.config.source.sequence_length),
        "perplexity": trainer.progress.perplexity,
        **({"counted_in": {"quantize": settings.quantize, "output_type": settings.output_type}} if is_counted else {}),
        **({"quantisation": trainer.config.quantisation.to_dict()} if trainer.rounding is not None else {}),
        **({"bits_per_byte": trainer.progress.bits_per_byte} if trainer.progress.bits_per_byte else {}),
        **({"score": trainer.score_keeper.last()} if trainer.score_keeper is not None else {}),
        "quality": contract(measured["final"], measured["source"], source) if len(measured) == 2 else None,
    }


def _latency(trainer: Trainer) -> dict[str, Any]:
    """Return the predicted times before and after on the run's device, or {} without one."""
    time = trainer.plan.pruning.time if trainer.plan.pruning is not None else None
    if time is None:
        return {}
    shapes = {"source_ms": trainer.plan.architecture, "ms": trainer.architecture}
    ms = {name: time.measure.of(shape) for name, shape in shapes.items()}
    errors = [asdict(error) for error in time.profile.errors]
    return {"latency": {"workload": str(time.workload), **ms, "of": asdict(time.profile.measured_on), "errors": errors}}
