"""Checkpoints of a running training: whole or absent, a few kept, with everything to continue bit-identically."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from ...runtime.base.files import folder_written_atomically
from ..compute.distributed import Parallel
from ..reporting.metrics import RunProgress
from .run_folder import checkpoint_folders, write_contents


@dataclass(frozen=True)
class TrainingState:
    """Contents of a checkpoint beside the model and the optimizer."""

    progress: RunProgress
    extra: dict[str, Any]
    """JSON values, such as the surviving groups."""
    tensors: dict[str, Any]
    """Nested tensors and numbers: data position, saliency, Gram matrices."""


def checkpoint_path(run_folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a run's step. Later steps have later names."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def save_training_state(
    target: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    keep: int,
    parallel: Parallel,
    kept: Path | None = None,
) -> None:
    """Write checkpoint `target` atomically, then delete all but the newest `keep` and `kept` beside it.

    Every rank writes its own shards.
    """
    with folder_written_atomically(target, parallel.is_main, parallel.barrier) as temporary:
        with _no_process_group_warning():
            tensors = _weights_and_moments(model, optimizer)
            dcp.save(tensors, checkpoint_id=temporary / "state", no_dist=parallel.world_size == 1)
        if parallel.is_main:
            torch.save({"tensors": state.tensors, "rng": _rng_state()}, temporary / "tensors.pt")
            (temporary / "config.json").write_text(model.config.to_json_string(use_diff=False), encoding="utf-8")
            values = {"progress": asdict(state.progress), **state.extra}
            (temporary / "trainer.json").write_text(json.dumps(values), encoding="utf-8")
            write_contents(temporary)  # dcp.save returned, so every rank's shards are there
    if parallel.is_main:
        for stale in checkpoint_folders(target.parent)[:-keep]:
            if stale != kept:
                shutil.rmtree(stale)


def _weights_and_moments(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the tensors of model and optimizer by parameter. A tied head and embedding are one."""
    model.state_dict()  # under FSDP it puts shards back where an evaluation left whole tensors, which have no moments
    parameters = dict(model.named_parameters())
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return {"model": weights, "optimizer": {name: optimizer.state[each] for name, each in parameters.items()}}


def state_bytes(model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Estimate the bytes of a checkpoint on disk over all ranks: weights and moments."""
    state = _weights_and_moments(model, optimizer)
    moments = (tensor for each in state["optimizer"].values() for tensor in each.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*state["model"].values(), *moments))
    return round(1.1 * size) + 2_000_000  # scores, Gram matrices, the stream's position, headers


def as_tensors(value: Any) -> Any:
    """Copy numpy arrays in nested values to tensors. torch would save the whole base of a view."""
    return _map_leaves(value, lambda leaf: torch.tensor(leaf) if isinstance(leaf, np.ndarray) else leaf)


def as_arrays(value: Any) -> Any:
    """Convert the values of `as_tensors` back."""
    return _map_leaves(value, lambda leaf: leaf.cpu().numpy() if torch.is_tensor(leaf) else leaf)


def _map_leaves(value: Any, convert: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {name: _map_leaves(item, convert) for name, item in value.items()}
    return [_map_leaves(item, convert) for item in value] if isinstance(value, list) else convert(value)


def load_training_state(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> dict[str, Any]:
    """Fill model and optimizer (already of the checkpoint's shape), set the RNGs, and return the other tensors."""
    with _no_process_group_warning(), torch.no_grad():
        tensors = _weights_and_moments(model, optimizer)
        dcp.load(tensors, checkpoint_id=folder / "state", no_dist=parallel.world_size == 1)
    small = torch.load(folder / "tensors.pt", weights_only=True, map_location=parallel.device)
    _set_rng_state(small["rng"])
    return small["tensors"]


@contextlib.contextmanager
def _no_process_group_warning() -> Iterator[None]:
    """Suppress torch's warning about a missing process group for a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def read_trainer_json(folder: Path) -> tuple[RunProgress, dict[str, Any]]:
    """Return (progress, extra) of a sound checkpoint (see run_folder.damage)."""
    values = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    return RunProgress(**values.pop("progress")), values


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
