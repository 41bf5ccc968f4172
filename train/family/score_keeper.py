"""Keep the score of a job while pruning: measure it before every removal, and return to the last size that kept it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...runtime.base.errors import UsageError
from ...runtime.base.files import write_json_atomically
from ...runtime.base.progress import ProgressDisplay
from ...runtime.base.quantities import format_count
from ..checkpoint.milestone import Milestone
from ..checkpoint.run_folder import SCORES_FILE, checkpoint_folders, damage
from ..checkpoint.state import checkpoint_path
from ..checkpoint.writer import Checkpoints
from ..config.sections import ScoreConfig
from ..evaluation.jobs import read_examples, run_job
from ..evaluation.torch_model import TorchModel
from ..model.folder_files import read_json
from ..pruning.pruner import Pruner


class ScoreTooLowError(Exception):
    """The score fell below its limit. The run continues from `checkpoint` without further removals."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"the score is kept by {checkpoint.name}")
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class SizeScore:
    """The score of the model of one step."""

    step: int
    parameters: int
    size: float
    """Size in the unit of the budget: parameters, bytes of the exported file or milliseconds."""
    score: float
    stderr: float


class ScoreCheck(Milestone):
    """Scores the model before every removal and at the end, and writes a checkpoint to return to."""

    def __init__(
        self,
        keeper: ScoreKeeper,
        pruner: Pruner,
        checkpoints: Checkpoints,
        evaluated: Callable[[], AbstractContextManager[TorchModel]],
    ) -> None:
        """Score the model that `evaluated` yields."""
        self.keeper, self.pruner, self.checkpoints, self.evaluated = keeper, pruner, checkpoints, evaluated
        checkpoints.kept = keeper.kept_checkpoint(checkpoints.progress.step)

    def before_removal(self, target: float) -> None:
        """Raise ScoreTooLowError below the limit."""
        self._check()
        self.checkpoints.save_once()
        self.checkpoints.kept = self.keeper.kept_checkpoint(self.checkpoints.progress.step)

    def at_end(self) -> None:
        """Raise ScoreTooLowError below the limit."""
        self._check()
        self.checkpoints.kept = None

    def _check(self) -> None:
        step, pruner = self.checkpoints.progress.step, self.pruner
        with self.evaluated() as model:
            self.keeper.check(model, step, pruner.architecture.num_parameters, pruner.size)


class ScoreKeeper:
    """The scores of one run, in its file scores.json."""

    def __init__(self, settings: ScoreConfig, folder: Path, is_resumed: bool, display: ProgressDisplay) -> None:
        """Read the examples, and the scores of a resumed run. Raises DataError for a malformed example."""
        self.settings, self.display, self.path = settings, display, folder / SCORES_FILE
        self.examples = read_examples(settings.task, settings.task_limit)
        self.sizes: list[SizeScore] = []
        self.smallest: float | None = None
        if is_resumed and self.path.is_file():
            values = read_json(self.path)
            self.sizes, self.smallest = [SizeScore(**each) for each in values["sizes"]], values["smallest"]

    def check(self, model: TorchModel, step: int, parameters: int, size: float) -> None:
        """Score `model`, the one of a step, with its parameters and its size in the unit of the budget.

        A score of the same step from before a resume is used again. Raises ScoreTooLowError below the limit, and
        UsageError if the whole model has no score of which a share can be kept, or the checkpoint to return to is bad.
        """
        # a resumed run comes to the same step again, and answering the examples takes minutes
        found = next((each for each in self.sizes if (each.step, each.size) == (step, size)), None)
        if found is None:
            found = SizeScore(step, parameters, size, *self._measure(model))
            self.sizes.append(found)
            self._write()
        first, share = self.sizes[0], self.settings.keep_score
        self.display.say(
            f"score at {format_count(found.parameters)} parameters: {found.score:.3f} ± {found.stderr:.3f}, before the "
            f"first removal {first.score:.3f}"
        )
        if share is None:
            return
        if self.smallest is not None:
            if found.score < share * first.score:
                self.display.say(f"that is below {share:g} of it, though it was not when the run returned to this size")
            return
        if not first.score > 0:
            raise UsageError(
                f"--keep-score {share:g}: the whole model has a score of {first.score:.3f} on {self.settings.task}; "
                "train longer before --prune-start, or omit --keep-score"
            )
        if found.score >= share * first.score:
            return
        kept = next((each for each in self._kept(share, step)[::-1] if not damage(self._checkpoint_of(each))), None)
        if kept is None:  # before anything is deleted
            raise UsageError(
                f"the score is below {share:g} of the first, and no sound checkpoint of a size that kept it is left in "
                f"{self.path.parent / 'checkpoints'}; train again, or without --keep-score"
            )
        checkpoint = self._checkpoint_of(kept)
        for newer in checkpoint_folders(checkpoint.parent):  # before the file says so: a killed run measures again
            if newer.name > checkpoint.name:
                shutil.rmtree(newer)
        self.smallest = kept.size
        self._write()
        self.display.say(
            f"that is below {share:g} of it: the run returns to {format_count(kept.parameters)} parameters"
        )
        raise ScoreTooLowError(checkpoint)

    def kept_checkpoint(self, step: int) -> Path | None:
        """Return the checkpoint at or before `step` to which the run may return, or None if it will not return."""
        share = self.settings.keep_score
        kept = self._kept(share, step) if share is not None and self.smallest is None else []
        return self._checkpoint_of(kept[-1]) if kept else None

    def _kept(self, share: float, step: int) -> list[SizeScore]:
        """Return the sizes up to `step` with at least `share` of the first score, the largest first."""
        return [each for each in self.sizes if each.step <= step and each.score >= share * self.sizes[0].score]

    def _checkpoint_of(self, size: SizeScore) -> Path:
        return checkpoint_path(self.path.parent, size.step)

    def last(self) -> dict[str, Any]:
        """Return the last score and how it was measured."""
        metric, last = self.settings.metric, self.sizes[-1]
        return {"metric": metric, "examples": len(self.examples), "score": last.score, "stderr": last.stderr}

    def _measure(self, model: TorchModel) -> tuple[float, float]:
        """Return the score of a model and its standard error."""
        show = partial(self.display.update, "answering the examples of --task")
        result = run_job(model, self.examples, self.settings.metric, max_tokens=self.settings.task_tokens, advance=show)
        return result.mean(result.score_name), result.stderr(result.score_name)

    def _write(self) -> None:
        values = {"sizes": [asdict(each) for each in self.sizes], "smallest": self.smallest}
        write_json_atomically(self.path, values)
