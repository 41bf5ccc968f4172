"""What a run with --sizes learns after a larger size, for the finish of that size.

The run removes more groups and goes on learning. Its later steps also change weights that a larger size still has. A
larger size adds a share of these changes to its own weights before its finish, and so learns from later text, too. The
changes by removals and by their refits are left out, because they make up for groups that the larger size still has.
The share is the one of the lowest perplexity on some text of the training.

For each removal there are two files: the weights after it, and their changes until the next removal or the end. There
are none if every step may be a removal (without --removals).
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime.base.files import folder_written_atomically, link_or_copy, written_atomically
from ..checkpoint.milestone import Milestone
from ..checkpoint.run_folder import LATER_STEPS_FOLDER, SIZES_FOLDER, checkpoint_folders
from ..checkpoint.state import PartState
from ..checkpoint.writer import Checkpoints
from ..compute.trained_model import TrainedModel
from ..model.architecture import Architecture
from ..model.rescaling import width_factor
from ..pruning.pruner import Pruner
from ..pruning.selection import Kept, Removal
from ..pruning.surgery import slice_tensor
from ..reporting.metrics import RunProgress

_log = logging.getLogger("efficientllm.train")

SHARES = (0.25, 0.5, 0.75)
"""Shares of the changes that a larger size tries (research/log/2026-11-30-a-share-of-the-later-steps.md)."""


class LaterSteps:
    """The changes of a run's weights between its removals."""

    def __init__(self, run: Path) -> None:
        """Write into the folder of a run."""
        self.folder = run / LATER_STEPS_FOLDER
        self.removal: int | None = None
        """Step of the removal that the current changes follow, if they are recorded. A checkpoint keeps it."""

    def begin(self, step: int, model: Any, architecture: Architecture, survivors: Kept) -> None:
        """Write the weights after the removal of a step. `survivors` are positions in the source."""
        weights = {name: weight.detach().cpu() for name, weight in model.named_parameters()}
        self._write(step, "weights", {"weights": weights, "shape": architecture.to_dict(), "survivors": survivors})
        self.removal = step

    def end(self, model: Any) -> None:
        """Write the changes since `begin`. Does nothing if there was none, or if its file was deleted."""
        if self.removal is None or not self._path(self.removal, "weights").is_file():
            return
        stage = torch.load(self._path(self.removal, "weights"), weights_only=True)
        before = stage.pop("weights")
        stage["changes"] = {name: weight.detach().cpu() - before[name] for name, weight in model.named_parameters()}
        self._write(self.removal, "changes", stage)
        self.removal = None

    def _path(self, step: int, what: str) -> Path:
        return self.folder / f"step-{step:08d}.{what}"

    def _write(self, step: int, what: str, content: dict[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        with written_atomically(self._path(step, what)) as stream:
            torch.save(content, stream)


class RecordLaterSteps(Milestone):
    """Records the later steps of a run with --sizes, once it has a branch."""

    def __init__(self, folder: Path, pruner: Pruner, trained: TrainedModel, progress: RunProgress) -> None:
        """Record into the run's folder."""
        self.steps, self.folder = LaterSteps(folder), folder
        self.pruner, self.trained, self.progress = pruner, trained, progress

    def before_removal(self, target: float) -> None:
        self.steps.end(self.trained.model)

    def after_removal(self) -> None:
        if (self.folder / SIZES_FOLDER).is_dir() and self.pruner.settings.keeps_later_steps:
            pruner = self.pruner
            self.steps.begin(self.progress.step, self.trained.model, pruner.architecture, pruner.survivors)

    def at_end(self) -> None:
        self.steps.end(self.trained.model)

    def state(self) -> PartState:
        """Return the step of the removal that the current changes follow."""
        return PartState({"removal": self.steps.removal, "are_added": False})

    def load(self, state: PartState) -> None:
        self.steps.removal = state.values["removal"]


class AddLaterSteps(Milestone):
    """Adds a share of the later steps of its run to a larger size, once."""

    def __init__(
        self, checkpoints: Checkpoints, pruner: Pruner, trial_perplexity: Callable[[], Callable[[], float]]
    ) -> None:
        """Choose the share by the perplexity that a result of `trial_perplexity` measures."""
        self.checkpoints, self.pruner, self.trial_perplexity = checkpoints, pruner, trial_perplexity
        self.are_added = False

    def at_start(self) -> None:
        folder, pruner = self.checkpoints.folder, self.pruner
        if self.are_added or not has_later_steps(folder):
            return
        model = self.checkpoints.trained.model
        add_later_steps(folder, model, pruner.architecture, pruner.survivors, self.trial_perplexity())
        self.are_added = True
        self.checkpoints.mark_changed()

    def state(self) -> PartState:
        """Tell whether the steps are added."""
        return PartState({"removal": None, "are_added": self.are_added})

    def load(self, state: PartState) -> None:
        self.are_added = state.values["are_added"]


def has_later_steps(folder: Path) -> bool:
    """Tell whether a folder has changes of a run's later steps."""
    return any((folder / LATER_STEPS_FOLDER).glob("*.changes"))


def link_later_steps(run: Path, branch: Path) -> None:
    """Link the changes of a run that follow the checkpoint of a larger size into the folder of that size."""
    checkpoints = checkpoint_folders(branch / "checkpoints")
    if not checkpoints or (branch / LATER_STEPS_FOLDER).is_dir():
        return
    first = checkpoints[-1].name
    if not (run / LATER_STEPS_FOLDER / f"{first}.changes").is_file():  # the size has trained since then, on its own
        return
    with folder_written_atomically(branch / LATER_STEPS_FOLDER) as temporary:
        for path in (run / LATER_STEPS_FOLDER).glob("*.changes"):
            if path.stem >= first:
                link_or_copy(path, temporary / path.name)


@torch.no_grad()
def add_later_steps(
    branch: Path, model: Any, architecture: Architecture, survivors: Kept, perplexity: Callable[[], float]
) -> float:
    """Add the share of the linked changes to a larger size that gives it the lowest perplexity. Return the share.

    It is 0 if all SHARES raise the perplexity. `survivors` are positions in the source. `perplexity` may raise; the
    weights are then as before.
    """
    changes = _sum_of_changes(branch, model, architecture, survivors)
    weights = dict(model.named_parameters())
    before = {name: weights[name].clone() for name in changes}

    def add(share: float) -> None:
        for name, change in changes.items():
            weights[name].copy_(before[name] + share * change)

    found, best = {0.0: perplexity()}, 0.0
    try:
        for share in SHARES:
            add(share)
            value = perplexity()
            found[share] = value if math.isfinite(value) else math.inf
        best = min(found, key=found.__getitem__)
    finally:  # a stop signal leaves the weights as they were
        add(best)
    _log.info(
        f"added {best:g} of the changes that later steps made: perplexity {found[0.0]:.2f} to {found[best]:.2f} on "
        "text of training"
    )
    return best


def _sum_of_changes(branch: Path, model: Any, architecture: Architecture, survivors: Kept) -> dict[str, Tensor]:
    """Return the sum of the linked changes for each weight of a larger size."""
    weights, total = dict(model.named_parameters()), {}
    for path in sorted((branch / LATER_STEPS_FOLDER).glob("*.changes")):
        stage = torch.load(path, weights_only=True)
        later, kept = Architecture.from_dict(stage["shape"]), {}
        for kind, vectors in stage["survivors"].items():
            pairs = zip(survivors[kind], vectors, strict=True)
            kept[kind] = [torch.searchsorted(mine, theirs) for mine, theirs in pairs]
        removal = Removal(architecture, later, kept, ())
        for name, change in stage["changes"].items():
            weight = weights[name]
            places = slice_tensor(name, torch.arange(weight.numel()).view(weight.shape), removal).flatten()
            target = total.setdefault(name, torch.zeros_like(weight)).view(-1)
            factor = width_factor(name, architecture, later)
            target.index_add_(0, places.to(weight.device), change.flatten().to(weight), alpha=1 / factor)
    return total


def drop_later_steps(folder: Path) -> None:
    """Delete the files of a run or of a larger size that is finished."""
    shutil.rmtree(folder / LATER_STEPS_FOLDER, ignore_errors=True)
