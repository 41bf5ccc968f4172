"""--teacher self: the model from before the first removal teaches the rest of the run."""

from __future__ import annotations

from pathlib import Path

from ..runtime.base.files import folder_written_atomically
from .checkpoint.milestone import Milestone
from .checkpoint.run_folder import TEACHER_FOLDER, delete_replaced_run
from .checkpoint.state import PartState
from .compute.loss import frozen_copy
from .compute.trained_model import TrainedModel
from .model.irregular import save_checkpoint
from .model.source import load_source
from .run_text import RunText


class OwnTeacher(Milestone):
    """The teacher of one run, in the run's folder: a resumed run's own model is pruned by then."""

    def __init__(self, folder: Path, trained: TrainedModel, text: RunText) -> None:
        self.folder, self.trained, self.text = folder, trained, text

    def before_removal(self, target: float) -> None:
        """Make the current model the teacher, unless there is one."""
        loss, parallel = self.trained.loss, self.trained.parallel
        if loss.teacher is not None:
            return
        loss.set_teacher(frozen_copy(self.trained.model, loss.dtype, parallel.device))
        if parallel.is_main:
            delete_replaced_run(self.folder)
            with folder_written_atomically(self.folder / TEACHER_FOLDER) as temporary:
                save_checkpoint(loss.teacher, self.text.tokenizer, temporary)
        parallel.barrier()

    def state(self) -> PartState:
        """Tell whether there is a teacher."""
        return PartState(self.trained.loss.teacher is not None)

    def load(self, state: PartState) -> None:
        """Read the teacher if there was one."""
        if state.values:
            teacher, _ = load_source(str(self.folder / TEACHER_FOLDER), "the teacher of the run")
            self.trained.loss.set_teacher(frozen_copy(teacher, self.trained.loss.dtype, self.trained.parallel.device))
