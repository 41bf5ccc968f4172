"""Checkpoints of a running training: whole or absent, a few kept, with everything to continue bit-identically."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter

from ...runtime.base.files import HashingFile, folder_written_atomically, full_disk_errno
from ..compute.distributed import Parallel
from ..reporting.metrics import RunProgress
from .run_folder import checkpoint_folders, write_contents


@dataclass(frozen=True)
class PartState:
    """State of one part of a run."""

    values: Any = None
    """JSON values, such as the surviving groups."""
    tensors: Any = None
    """Nested tensors and numbers that all ranks share: data position, saliency."""
    own: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of this rank alone: Gram matrices."""


@dataclass(frozen=True)
class TrainingState:
    """Contents of a checkpoint beside the model and the optimizer."""

    progress: RunProgress
    parts: dict[str, PartState]


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
        writer = HashingWriter(temporary / "state")
        with _no_process_group_warning():
            tensors = _weights_and_moments(model, optimizer)
            # the patient group, as ranks wait for the slowest disk
            options: dict[str, Any] = {"no_dist": parallel.world_size == 1, "process_group": parallel.patient_group}
            dcp.save(tensors, checkpoint_id=temporary / "state", storage_writer=writer, **options)
        own = rank_file(temporary, parallel)
        with HashingFile(own) as file:
            torch.save({name: part.own for name, part in state.parts.items()}, file)
        # hashed as they were written, so that gigabytes are not read back
        known = parallel.gather(writer.contents() | {f"{own.parent.name}/{own.name}": file.describe()})
        if parallel.is_main:
            with HashingFile(temporary / "tensors.pt") as file:
                tensors_of_parts = {name: part.tensors for name, part in state.parts.items()}
                torch.save({"tensors": tensors_of_parts, "rng": _rng_state()}, file)
            known.append({"tensors.pt": file.describe()})
            (temporary / "config.json").write_text(model.config.to_json_string(use_diff=False), encoding="utf-8")
            values: dict[str, Any] = {"progress": asdict(state.progress), "ranks": parallel.world_size}
            values["parts"] = {name: part.values for name, part in state.parts.items()}
            (temporary / "trainer.json").write_text(json.dumps(values), encoding="utf-8")
            write_contents(temporary, {name: entry for each in known for name, entry in each.items()})
    if parallel.is_main:  # only after the new one is in place
        for stale in checkpoint_folders(target.parent)[:-keep]:
            if stale != kept:
                shutil.rmtree(stale)


def rank_file(checkpoint: Path, parallel: Parallel) -> Path:
    """Return the file of a checkpoint with the tensors of this rank."""
    return checkpoint / "state" / f"rank-{parallel.rank}.pt"


class HashingWriter(FileSystemWriter):
    """Writes this rank's shards into a folder and computes their hashes meanwhile."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder, self.files = folder, list[HashingFile]()
        self.fs.create_stream = self._create_stream  # type: ignore[method-assign, assignment]

    @contextlib.contextmanager
    def _create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[HashingFile]:
        try:
            with HashingFile(Path(path)) as file:
                self.files.append(file)
                yield file
        except (OSError, RuntimeError) as error:  # all ranks receive it without its cause, and the main one makes room
            code = full_disk_errno(self.folder, error)
            if not code:
                raise
            raise OSError(code, os.strerror(code)) from error

    def contents(self) -> dict[str, dict[str, Any]]:
        """Return {name below the checkpoint: size and hash} of the files, less torch's metadata, which it renames."""
        names = {f"{self.folder.name}/{file.path.name}": file.describe() for file in self.files}
        return {name: entry for name, entry in names.items() if not name.endswith(".tmp")}


def _weights_and_moments(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the tensors of model and optimizer by parameter. A tied head and embedding are one."""
    # under FSDP it puts shards back where an evaluation left whole tensors, which have no moments
    model.state_dict()
    parameters = dict(model.named_parameters())
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return {"model": weights, "optimizer": {name: optimizer.state[each] for name, each in parameters.items()}}


def state_bytes(model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Estimate the bytes of a checkpoint on disk over all ranks: weights and moments."""
    state = _weights_and_moments(model, optimizer)
    tensors = list(state["model"].values())
    for moments in state["optimizer"].values():
        tensors += moments.values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return round(1.1 * size) + 2_000_000  # scores, Gram matrices, the stream's position, headers


def as_tensors(value: Any) -> Any:
    """Copy numpy arrays in nested values to tensors."""
    # copied, as torch would save the whole base of a view
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
) -> dict[str, PartState]:
    """Fill model and optimizer (already of the checkpoint's shape), set the RNGs, and return the states of parts."""
    with _no_process_group_warning(), torch.no_grad():
        tensors = _weights_and_moments(model, optimizer)
        dcp.load(tensors, checkpoint_id=folder / "state", no_dist=parallel.world_size == 1)
    small = torch.load(folder / "tensors.pt", weights_only=True, map_location=parallel.device)
    _set_rng_state(small["rng"])
    own = torch.load(rank_file(folder, parallel), weights_only=True, map_location=parallel.device)
    _, values = read_trainer_json(folder)
    return {name: PartState(each, small["tensors"][name], own[name]) for name, each in values["parts"].items()}


@contextlib.contextmanager
def _no_process_group_warning() -> Iterator[None]:
    """Suppress torch's warning about a missing process group for a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def read_trainer_json(folder: Path) -> tuple[RunProgress, dict[str, Any]]:
    """Return (progress, {"ranks", "parts"}) of a sound checkpoint (see run_folder.damage)."""
    values = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    return RunProgress(**values.pop("progress")), values


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
