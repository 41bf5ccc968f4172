"""A whole training run: check the request, load, train, and leave a model, its metrics and its architecture behind."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..runtime import flags
from ..runtime.errors import UsageError
from ..runtime.files import folder_written_atomically, require_empty, write_json_atomically, write_text_atomically
from ..runtime.quantities import format_count
from .architecture import Architecture
from .checkpoint import checkpoint_folders
from .config import TrainConfig, changed_settings
from .documents import DataSpec
from .hardware import Hardware, choose_hardware
from .models import architecture_of, build, load_source, save_checkpoint
from .packing import PackedStream, held_out_windows
from .plots import plot_architecture
from .saliency import criterion_named
from .schedule import DroppingSchedule
from .selection import SelectionRules, check_target
from .trainer import Trainer, survivors_to_json


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
    torch.manual_seed(config.run.seed)
    source, tokenizer = load_source(config.source.source)
    architecture = architecture_of(source.config)
    schedule = _dropping_schedule(config, architecture)
    trainer = _make_trainer(config, source, tokenizer, schedule, hardware, folder, last)
    if last is None:
        _prepare_folder(config, folder)
    print(f"source: {config.source.source}, {format_count(architecture.num_parameters)} parameters", flush=True)
    print(f"device: {hardware.describe()}", flush=True)
    if last is not None:
        print(f"resuming from {last.name} at {format_count(trainer.progress.tokens)} tokens", flush=True)
    if not trainer.train():
        return None
    _write_result(trainer, architecture, folder)
    return folder / "model"


def _resume_point(config: TrainConfig, folder: Path) -> Path | None:
    """The checkpoint to continue from; None for a new run. A run killed before its first checkpoint starts anew."""
    if not config.run.resume:
        return None
    settings = folder / "config.toml"
    if not settings.is_file():
        raise UsageError(f"--resume: {folder} holds no run (no config.toml)")
    before = flags.merge(
        TrainConfig(),
        {name: value for section in tomllib.loads(settings.read_text()).values() for name, value in section.items()},
        str(settings),
    )
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


def _dropping_schedule(config: TrainConfig, source: Architecture) -> DroppingSchedule | None:
    settings = config.pruning
    if settings.target_params is None and settings.target_ratio is None:
        return None
    if settings.target_params is not None:
        target = settings.target_params
    else:
        target = round((settings.target_ratio or 1.0) * source.num_parameters)
    check_target(source, SelectionRules(settings.kinds, settings.width_multiple), target)
    tokens = config.optimizer.tokens
    return DroppingSchedule(
        source.num_parameters, target, round(settings.prune_start * tokens), round(settings.prune_end * tokens)
    )


def _make_trainer(
    config: TrainConfig,
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    schedule: DroppingSchedule | None,
    hardware: Hardware,
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
    model = source
    if last is not None:
        saved = AutoConfig.from_pretrained(last)
        model = build(saved, architecture_of(saved))
        model.generation_config = source.generation_config
    trainer = Trainer(config, model, tokenizer, stream, held_out, schedule, hardware, folder)
    if last is not None:
        trainer.restore(last)
    return trainer


def _write_result(trainer: Trainer, source: Architecture, folder: Path) -> None:
    """Write the final model with what is known about it, then drop the checkpoints."""
    architecture = trainer.architecture
    summary = {
        "source": trainer.config.source.source,
        "data": list(trainer.config.source.data),
        "tokens": trainer.progress.tokens,
        "seconds": round(trainer.progress.seconds, 1),
        "source_parameters": source.num_parameters,
        "parameters": architecture.num_parameters,
        "held_out_tokens": int(trainer.held_out.shape[0] * trainer.config.source.sequence_length),
        "perplexity": trainer.progress.perplexity,
    }
    description = {
        "source": source.to_dict(),
        "final": architecture.to_dict(),
        "survivors": survivors_to_json(trainer.survivors),
    }
    with folder_written_atomically(folder / "model") as temporary:
        save_checkpoint(trainer.model, trainer.tokenizer, temporary)
        (temporary / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_json_atomically(folder / "architecture.json", description)
    plot_architecture(source, architecture, folder / "architecture.png")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
