"""The pruning-aware pretraining loop: train, gather saliency from the same gradients, and remove groups."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.base.errors import DataError, TrainingDivergedError
from ...runtime.base.quantities import format_count
from ..checkpoint.run_folder import checkpoint_folders, has_stashed_run
from ..compute.distributed import reshard
from ..compute.stop_signal import StopRequested
from ..family.score_keeper import ScoreTooLowError
from ..pruning.pruner import Pruner
from .pruning_event import PruningEvent
from .run_state import RunState, UnfinishedStep

_log = logging.getLogger("efficientllm.train")

MAX_SKIPPED_IN_A_ROW = 10
"""Steps with a non-finite loss or gradient before a run gives up."""


@dataclass(frozen=True)
class Finished:
    """The model is written and measured."""


@dataclass(frozen=True)
class Stopped:
    """A signal stopped the run early. A message tells what is kept and how to continue."""


@dataclass(frozen=True)
class GoBack:
    """The run continues from a checkpoint, without further removals."""

    checkpoint: Path


class Trainer(RunState):
    """Trains one run. The caller has loaded (or rebuilt) the model; `train` does the rest."""

    def train(self, write_model: Callable[[], None]) -> Finished | Stopped | GoBack:
        """Train to the last token, write a checkpoint and the model (by `write_model`, a collective call), measure it.

        Return how the run ended.
        """
        try:
            with self.stop_signal, self.display:
                try:
                    self._loop()
                except StopRequested as request:
                    self._save_stopped(request)
                    return Stopped()
                return self._finish(write_model)
        except ScoreTooLowError as error:
            return GoBack(error.checkpoint)
        finally:
            self.metrics.close()

    def _loop(self) -> None:
        """Train to the last token. Raises StopRequested on a signal."""
        total, every = self.config.optimizer.tokens, self.config.run.checkpoint_every
        if "source" not in self.progress.perplexity:
            self._measure_stage("source")
        for milestone in self.milestones:
            milestone.at_start()
        # the checkpoint was written between a step's update and the end of its removal or measurements
        if self.unfinished is not None:
            if self.unfinished.record is not None:
                self._log_step(self._finish_step(self.unfinished))
            self._measure_after_step()
        while self.progress.tokens < total:
            self._log_step(self._step_or_save())
            self._measure_after_step()
            self.stop_signal.check()
            # not after the last step, whose checkpoint `_finish` writes
            is_due = every and self.progress.step % every == 0 and self.progress.tokens < total
            if is_due and self._is_sound():
                self.checkpoints.save_if_there_is_room()
        if not self._is_sound():
            raise TrainingDivergedError(
                f"the run ended at step {self.progress.step} with weights that give no finite loss; no model is "
                f"written: {self._recovery_hint()}"
            )
        for milestone in self.milestones:
            milestone.at_end()

    def _measure_stage(self, name: str) -> None:
        """Measure the source or the final model."""
        self.measuring.stage(name)
        self.stop_signal.check()
        if self.config.run.quality:
            self.measuring.quality(name)

    def _log_step(self, record: dict[str, Any]) -> None:
        """Log and show a step whose removal is done."""
        self.unfinished = UnfinishedStep(None)
        self.checkpoints.mark_changed()
        self.trained.heap.trim_if_grown()
        self.metrics.write(record)
        done, total = self.progress.tokens, self.config.optimizer.tokens
        self.throughput.add(self.training_step.tokens, record["seconds"])
        predicted = f"{record['ms']:.3f} ms  " if "ms" in record else ""
        text = (
            f"{format_count(done)}/{format_count(total)} tokens  loss {record['loss']:.3f}  {predicted}"
            f"{format_count(record['parameters'])} parameters  {self.throughput.tokens_per_second:.0f} tokens/s"
        )
        self.display.update("training", done, total, text)

    def _measure_after_step(self) -> None:
        """Take the measurements that are due. After StopRequested, the resumed run takes them."""
        every, progress = self.config.run.eval_every, self.progress
        with self.rounded_weights():  # those of the exported file are measured
            if self.pruner is not None and self.pruner.is_done and "after_pruning" not in progress.perplexity:
                self.measuring.stage("after_pruning")
            if every and progress.step % every == 0 and progress.tokens < self.config.optimizer.tokens:
                self.measuring.held_out_loss()
        self.unfinished = None

    def _finish(self, write_model: Callable[[], None]) -> Finished | Stopped:
        """Write the last checkpoint and the model, then measure it."""
        self.checkpoints.save_if_there_is_room()
        if self.rounding is not None:  # after the checkpoint, whose weights must stay unrounded for --resume
            reshard(self.trained.loss)
            self.rounding.make_permanent(self.model)
        write_model()
        try:
            self._measure_stage("final")
        except StopRequested as request:
            is_saved = self.checkpoints.is_saved
            remedy = "--resume repeats only the measuring" if is_saved else "measure it with efficientllm-eval"
            model = self.plan.folder / "model"
            self.display.say(f"stopped by {request} while the final model was measured; {model} is written; {remedy}")
            return Stopped()
        return Finished()

    def _recovery_hint(self) -> str:
        """Return the remedy for a divergence."""
        if checkpoint_folders(self.plan.folder / "checkpoints"):
            return "the last checkpoint is intact: --resume with a lower --learning-rate"
        return "start again with a lower --learning-rate"

    def _step_or_save(self) -> dict[str, Any]:
        """Take a step. If text cannot be read, save the run first, unless it would replace an older run."""
        try:
            return self._step()
        except DataError as error:  # all ranks raise that of one, so they all save
            if self.parallel.any(self.parallel.is_main and has_stashed_run(self.plan.folder)):
                raise
            name = (self.checkpoints.before_removal or self.checkpoints.save()).name
            raise DataError(f"{error}; checkpoint {name} is written: repair the text and --resume") from error

    def _step(self) -> dict[str, Any]:
        """Take one optimizer step and the pruning event that is due after it. Return the step's log record."""
        start = time.monotonic()
        record, is_usable = self.training_step.run(self.rounded_weights())
        if self.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDivergedError(
                f"loss {record['loss']} with gradient norm {record['grad_norm']} for {MAX_SKIPPED_IN_A_ROW} steps in a "
                f"row at step {record['step']}; {self._recovery_hint()}"
            )
        seconds = time.monotonic() - start
        self.progress.seconds += seconds
        # kept until its removal is done: a checkpoint of an interrupted removal continues from here
        self.unfinished = UnfinishedStep(record, is_usable, seconds)
        return self._finish_step(self.unfinished)

    def _finish_step(self, step: UnfinishedStep) -> dict[str, Any]:
        """Remove the groups that are due after a step, and return its complete log record."""
        assert step.record is not None
        start = time.monotonic()
        removal = self._prune() if step.is_usable else {}
        seconds = time.monotonic() - start
        self.progress.seconds += seconds
        # of the step alone: a removal may take longer than many steps
        speed = self.training_step.speed(step.seconds, self.architecture.num_parameters)
        sizes: dict[str, Any] = {"parameters": self.architecture.num_parameters, **speed}
        time_target = self.plan.pruning.time if self.plan.pruning is not None else None
        if time_target is not None:
            sizes["ms"] = round(time_target.measure.of(self.architecture), 4)
        return {**step.record, **sizes, **removal, "seconds": round(step.seconds + seconds, 4)}

    def _prune(self) -> dict[str, Any]:
        """Run the pruning event that is due, and return its log fields."""
        pruner, progress = self.pruner, self.progress
        if pruner is None or pruner.is_done or self.schedule is None:
            return {}
        if progress.step % pruner.settings.prune_every and progress.tokens < self.schedule.end_tokens:
            return {}
        # a given number of rows is removed before the schedule, which starts at the size without them
        removes_only_rows = pruner.is_vocabulary_due and pruner.settings.vocabulary_rows is not None
        target = pruner.size if removes_only_rows else self.schedule.target_at(progress.tokens)
        if not removes_only_rows:
            # a removal stops at every size on the way, whose model becomes a branch
            smaller_sizes = [amount for amount in pruner.plan.sizes.values() if amount < pruner.size]
            target = max([target, *smaller_sizes])
            if not pruner.is_above(target):
                return {}
            for milestone in self.milestones:
                milestone.before_removal(target)
            if pruner.settings.removals:
                describe = pruner.budget.measure.describe
                sizes = (pruner.size, target, pruner.budget.target)
                self.display.say("removal from {} to {} (target {})".format(*map(describe, sizes)))
        record, vocabulary = self._remove(pruner, target)
        for milestone in self.milestones:
            milestone.after_removal()
        if vocabulary is not None:
            self.metrics.write({"step": progress.step, "tokens": progress.tokens, **vocabulary})
        return record

    def _remove(self, pruner: Pruner, target: float) -> tuple[dict[str, Any], dict[str, float] | None]:
        """Run the pruning event down to `target`, after a checkpoint if it cannot be interrupted otherwise."""
        batch_size, checkpoints = self.config.optimizer.batch_size, self.checkpoints
        event = PruningEvent(pruner, self.trained, self.text, batch_size, self.stop_signal, self.display.update)
        if event.needs_restart:
            if not checkpoints.is_saved and self._is_sound():
                checkpoints.save_if_there_is_room()
            if checkpoints.is_saved:
                checkpoints.before_removal = checkpoints.current
        # without room for that checkpoint, a signal waits for the end of the event
        with self.stop_signal.held(event.needs_restart and checkpoints.before_removal is None):
            found = event.run(target)
        checkpoints.before_removal = None
        return found

    def _is_sound(self) -> bool:
        """Tell whether a checkpoint of the current weights is worth writing."""
        return not self.progress.skipped_in_a_row and self.measuring.is_sound()

    def _save_stopped(self, request: StopRequested) -> None:
        """Write the checkpoint of a stopped run, unless one from before the current removal replaces it."""
        before = self.checkpoints.before_removal
        if before is not None:
            outcome = f"checkpoint {before.name}, before its removal, is written"
        elif not self.progress.step:
            outcome = "nothing was trained yet"
        else:
            is_sound = self._is_sound()
            outcome = (
                f"checkpoint {self.checkpoints.save().name} is written" if is_sound else "the weights are not finite"
            )
        self.display.say(f"stopped by {request}; {outcome}; continue with --resume")
