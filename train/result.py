"""Write the results of a run: model, training.json, architecture.json, model card, plots."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.base.files import folder_written_atomically, write_json_atomically, write_text_atomically
from ..runtime.base.quantities import display_name
from .compute.gather import full
from .evaluation.quality.contract import Quality, contract
from .model.architecture import Architecture
from .model.irregular import save_checkpoint
from .pruning.pruner import kept_to_json
from .replaced_run import drop_replaced
from .reporting.metrics import read_metrics
from .reporting.model_card import model_card
from .reporting.plots import plot_architecture, plot_pruning, plot_training
from .run_folder import FINISHED_FILE, drop_checkpoints
from .trainer import Trainer

_log = logging.getLogger("efficientllm.train")


def write_model(trainer: Trainer) -> None:
    """Write the model folder before the model is measured (a collective call)."""
    source, folder = trainer.plan.architecture, trainer.plan.folder
    state = stored_weights(trainer.model, trainer.plan.save_dtype)
    if trainer.parallel.is_main:
        drop_replaced(folder)
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
        records = read_metrics(folder)
        plot_training(records, folder / "training.png")
        description: dict[str, Any] = {"source": source.to_dict(), "final": trainer.architecture.to_dict()}
        if trainer.pruner is not None:
            description["survivors"] = kept_to_json(trainer.pruner.survivors, source)
            plot_pruning(records, source, folder / "pruning.png")
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


def stored_weights(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return {name: whole tensor} of the final model, with a tied head once (a collective call).

    The type is `dtype`, or fp32 if a number exceeds it (fp16 ends at 65504).
    """
    weights = {name: full(parameter.detach()).to(dtype) for name, parameter in model.named_parameters()}
    beyond = next((name for name, weight in weights.items() if not torch.isfinite(weight).all()), None)
    if beyond is None or dtype == torch.float32:
        return weights
    _log.warning(f"{beyond} has numbers beyond {str(dtype).removeprefix('torch.')}: the model is stored in float32")
    return stored_weights(model, torch.float32)


def training_summary(trainer: Trainer) -> dict[str, Any]:
    """Return the contents of training.json, which exporters copy into their manifests."""
    measured = {name: Quality.from_dict(values) for name, values in trainer.progress.quality.items()}
    source = display_name(trainer.config.source.source)
    return {
        "source": source,
        "data": [display_name(each) for each in trainer.config.source.data],
        "tokens": trainer.progress.tokens,
        "seconds": round(trainer.progress.seconds, 1),
        "source_parameters": trainer.plan.architecture.num_parameters,
        "parameters": trainer.architecture.num_parameters,
        **_latency(trainer),
        "held_out_tokens": int(trainer.measuring.held_out.shape[0] * trainer.config.source.sequence_length),
        "perplexity": trainer.progress.perplexity,
        **({"quantisation": trainer.config.quantisation.to_dict()} if trainer.shipped is not None else {}),
        **({"bits_per_byte": trainer.progress.bits_per_byte} if trainer.progress.bits_per_byte else {}),
        "quality": contract(measured["final"], measured["source"], source) if len(measured) == 2 else None,
    }


def _latency(trainer: Trainer) -> dict[str, Any]:
    """Return the predicted times before and after on the run's device; {} without one."""
    time = trainer.plan.pruning.time if trainer.plan.pruning is not None else None
    if time is None:
        return {}
    ms = {name: time.measure.of(shape) for name, shape in _ends(trainer).items()}
    errors = [asdict(error) for error in time.profile.errors]
    return {"latency": {"workload": str(time.workload), **ms, "of": asdict(time.profile.measured_on), "errors": errors}}


def _ends(trainer: Trainer) -> dict[str, Architecture]:
    return {"source_ms": trainer.plan.architecture, "ms": trainer.architecture}
