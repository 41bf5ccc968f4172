"""Writes the checkpoints of one run, and knows the one that a score keeps and the one before a removal."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ...runtime.base.progress import ProgressDisplay
from ...runtime.base.quantities import format_bytes
from ..compute.trained_model import TrainedModel
from ..reporting.metrics import RunProgress
from . import state as training_state
from .run_folder import delete_replaced_run
from .state import PartState, TrainingState


@dataclass(frozen=True)
class Part:
    """A part of a run that a checkpoint holds."""

    state: Callable[[], PartState]
    """Return its state."""
    load: Callable[[PartState], None] = lambda state: None
    """Continue from a state."""


class Checkpoints:
    """Writes the checkpoints of one run (collective calls)."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        trained: TrainedModel,
        progress: RunProgress,
        display: ProgressDisplay,
        saving: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Write into the run's `folder`, and keep the newest `keep`. `parts` are added by their owners.

        Each checkpoint is written within the context of `saving`.
        """
        self._saving = saving
        self.folder, self.keep, self.trained, self.progress, self.display = folder, keep, trained, progress, display
        self.parts: dict[str, Part] = {}
        """Parts of the run beside model, optimizer and progress, in the order in which they are loaded."""
        self.kept: Path | None = None
        """Checkpoint of the last score that was kept. It stays as it is, however many newer ones there are."""
        self.before_removal: Path | None = None
        """Checkpoint from before the current removal, if an interrupted one must start again."""
        self._saved_step: int | None = None

    @property
    def current(self) -> Path:
        """Return the folder of the checkpoint of the current step, written or not."""
        return training_state.checkpoint_path(self.folder, self.progress.step)

    @property
    def is_saved(self) -> bool:
        """Tell whether a checkpoint holds the current state."""
        return self._saved_step == self.progress.step

    def mark_changed(self) -> None:
        """Note that the state differs from the checkpoint of its step."""
        self._saved_step = None

    def save(self) -> Path:
        """Write a checkpoint of the run and return its folder. A run that --overwrite replaces is deleted first.

        After the removal of the same step, the kept checkpoint stays: a resumed run repeats the removal.
        """
        if self.current == self.kept:
            return self.current
        trained, parallel = self.trained, self.trained.parallel
        if parallel.is_main:
            delete_replaced_run(self.folder)
        state = TrainingState(self.progress, {name: part.state() for name, part in self.parts.items()})
        with self._saving():
            training_state.save_training_state(
                self.current, trained.model, trained.optimizer, state, self.keep, parallel, self.kept
            )
        self._saved_step = self.progress.step
        return self.current

    def save_once(self) -> None:
        """Write a checkpoint unless one holds the current state."""
        if not self.is_saved:
            self.save()

    def save_if_there_is_room(self) -> None:
        """Write a checkpoint unless one holds the current state, or the disk has no room for it.

        Without room, the previous one stays and the run continues.
        """
        if self.is_saved or self.current == self.kept:
            return
        parallel = self.trained.parallel
        needed = training_state.state_bytes(self.trained.model, self.trained.optimizer)
        free = shutil.disk_usage(self.folder).free
        if parallel.any(parallel.is_main and free < needed):
            self.display.say(
                f"no checkpoint of step {self.progress.step}: it takes {format_bytes(needed)}, the disk has "
                f"{format_bytes(free)}; the run continues"
            )
            return
        self.save()

    def load(self, checkpoint: Path) -> None:
        """Continue from a checkpoint. The model must already have its shape, and `progress` its values."""
        self._saved_step = self.progress.step
        trained = self.trained
        states: Mapping[str, PartState] = training_state.load_training_state(
            checkpoint, trained.model, trained.optimizer, trained.parallel
        )
        for name, part in self.parts.items():
            part.load(states[name])
