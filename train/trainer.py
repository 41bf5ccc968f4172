"""The pruning-aware pretraining loop: train, gather saliency from the same gradients, and remove groups."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..runtime.base.errors import DataError, TrainingDivergedError
from ..runtime.base.files import folder_written_atomically
from ..runtime.base.flags import flatten
from ..runtime.base.progress import ProgressDisplay
from ..runtime.base.quantities import format_bytes, format_count
from .checkpoint import state as training_state
from .checkpoint.run_folder import (
    SIZES_FOLDER,
    TEACHER_FOLDER,
    checkpoint_folders,
    delete_replaced_run,
    has_stashed_run,
)
from .compute.distributed import reshard
from .compute.loss import TrainingLoss, frozen_copy, perplexity
from .compute.optimizer import make_optimizer
from .compute.trained_model import TrainedModel, configure
from .data.documents import corpus_fingerprint
from .later_steps import LaterSteps, add_later_steps, has_later_steps
from .measuring import Measuring, evaluated
from .model.architecture import Architecture
from .model.irregular import architecture_of, save_checkpoint
from .model.source import load_source
from .plan import RunPlan
from .pruning.plan import DroppingSchedule
from .pruning.pruner import Pruner
from .pruning_event import PruningEvent, switch_vocabulary
from .quantisation.weights import RoundedWeights
from .reporting.metrics import MetricsWriter, RunProgress, Throughput
from .run_text import RunText
from .score_keeper import ScoreKeeper
from .sizes import has_branch, write_branch
from .stop_signal import StopRequested, StopSignal
from .training_step import TrainingStep
from .vocabulary.tokenizer_pruning import renumber_settings

_log = logging.getLogger("efficientllm.train")

MAX_SKIPPED_IN_A_ROW = 10
"""Steps with a non-finite loss or gradient before a run gives up."""

TRIAL_TOKENS = 4096
"""Tokens of training text on which a larger size tries shares of later steps."""


@dataclass(frozen=True)
class UnfinishedStep:
    """A step whose weights are updated and whose removal or measurements may still be missing."""

    record: dict[str, Any] | None
    """Its log record before the removal, or None if it is logged and only measurements are missing."""
    is_usable: bool = True
    """Whether it changed the weights."""
    seconds: float = 0.0
    """Its duration so far."""


class Trainer:
    """One run. The caller has loaded (or rebuilt) the model; `train` does the rest."""

    def __init__(
        self, plan: RunPlan, loss: TrainingLoss, text: RunText, read_weights: Callable[[Any], None] | None = None
    ) -> None:
        """Prepare the run of `plan`, and restore its checkpoint if there is one.

        `read_weights` fills a model on the meta device after it is sharded.
        """
        self.plan, self.config, self.parallel, self.text = plan, plan.config, plan.compute.parallel, text
        self.corpora = {spec.path: corpus_fingerprint(spec.path) for spec in plan.data}
        """Path and fingerprint of each corpus."""
        optimizer, run = self.config.optimizer, self.config.run
        saved: dict[str, Any] = {}
        self.progress = RunProgress()
        if plan.resume is not None:
            self.progress, saved = training_state.read_trainer_json(plan.resume.checkpoint)
        # functions, because the loss is wrapped between the two, and a compacted model is configured again
        self.trained = TrainedModel(
            loss,
            self.parallel,
            partial(
                configure,
                activation_checkpointing=run.activation_checkpointing,
                compiles=run.compile,
                stores_gradients_as_computed=plan.compute.stores_gradients_as_computed(optimizer),
            ),
            partial(
                make_optimizer,
                learning_rate=optimizer.learning_rate,
                betas=(optimizer.beta1, optimizer.beta2),
                weight_decay=optimizer.weight_decay,
                moments=getattr(torch, optimizer.optimizer_dtype),
            ),
            read_weights,
        )
        self.pruner: Pruner | None = None
        self.schedule: DroppingSchedule | None = None
        if plan.pruning is not None:
            self.pruner = Pruner(plan.pruning, self.trained.model, self.parallel, run.seed)
            self.schedule = plan.pruning.schedule(optimizer.tokens)
        self.rounding: RoundedWeights | None = None
        """Rounds the weights to the type that the run trains for."""
        if self.config.quantisation.is_on:
            self.rounding = RoundedWeights(self.config.quantisation, self.parallel.mean_tensors)
        self.metrics = MetricsWriter(plan.folder, self.parallel.is_main, run.tensorboard)
        if run.wandb:
            self.metrics.use_wandb(self.progress, flatten(self.config))
        self.display, self.throughput = ProgressDisplay(silent=not self.parallel.is_main), Throughput()
        self.stop_signal = signal = StopSignal(self.parallel.any if self.parallel.world_size > 1 else None)
        self.measuring = Measuring(
            self.trained,
            text,
            self.progress,
            self.metrics,
            self.display,
            signal,
            optimizer.batch_size,
            prunes_vocabulary=plan.pruning is not None and plan.pruning.pieces is not None,
        )
        self.training_step = TrainingStep(self.trained, text.stream, self.progress, optimizer, self.pruner, signal)
        self.unfinished: UnfinishedStep | None = None
        """The latest step until its removal and measurements are done."""
        self._saved_step: int | None = None
        self.removal_checkpoint: Path | None = None
        """Checkpoint from before the current removal, if an interrupted one must start again."""
        self.later_steps = LaterSteps(plan.folder)
        self.has_later_steps = False
        """Tell whether the weights of a larger size have the later steps of its run."""
        self.score_keeper: ScoreKeeper | None = None
        self.kept_checkpoint: Path | None = None
        """Checkpoint of the last score that was kept."""
        if self.config.score.task:
            self.score_keeper = ScoreKeeper(self.config.score, plan.folder, plan.resume is not None, self.display)
        if plan.resume is not None:
            self._restore(plan.resume.checkpoint, saved)

    @property
    def model(self) -> Any:
        return self.trained.model

    @property
    def checkpoint(self) -> Path:
        """Return the folder of the checkpoint of the current step, written or not."""
        return training_state.checkpoint_path(self.plan.folder, self.progress.step)

    @property
    def is_saved(self) -> bool:
        """Tell whether a checkpoint holds the current state."""
        return self._saved_step == self.progress.step

    @property
    def architecture(self) -> Architecture:
        """Return the shape without removed groups."""
        return self.pruner.architecture if self.pruner is not None else architecture_of(self.model.config)

    def train(self, write_model: Callable[[], None]) -> bool:
        """Train to the last token, write a checkpoint and the model (by `write_model`, a collective call), measure it.

        Returns False if a signal stopped the run early. A message then tells what is kept and how to continue.
        """
        try:
            with self.stop_signal, self.display:
                try:
                    self._loop()
                except StopRequested as request:
                    self._save_stopped(request)
                    return False
                return self._finish(write_model)
        finally:
            self.metrics.close()

    def _loop(self) -> None:
        """Train to the last token. Raises StopRequested on a signal."""
        total, every = self.config.optimizer.tokens, self.config.run.checkpoint_every
        if "source" not in self.progress.perplexity:
            self._measure_stage("source")
        self._add_later_steps()
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
                self._save_if_there_is_room()
        if not self._is_sound():
            raise TrainingDivergedError(
                f"the run ended at step {self.progress.step} with weights that give no finite loss; no model is "
                f"written: {self._recovery_hint()}"
            )
        self.later_steps.end(self.model)
        self._check_score()

    def _add_later_steps(self) -> None:
        """Add a share of the changes that the run made later to the weights of a larger size."""
        if self.config.pruning.sizes or self.pruner is None or self.has_later_steps:
            return
        if has_later_steps(self.plan.folder):
            windows, batch_size = self.text.extra_windows(TRIAL_TOKENS), self.config.optimizer.batch_size
            arguments = self.trained.loss, windows, batch_size, self.parallel.device, self.stop_signal.check
            survivors = self.pruner.survivors
            add_later_steps(self.plan.folder, self.model, self.architecture, survivors, partial(perplexity, *arguments))
            self.has_later_steps, self._saved_step = True, None

    def _measure_stage(self, name: str) -> None:
        """Measure the source or the final model."""
        self.measuring.stage(name)
        self.stop_signal.check()
        if self.config.run.quality:
            self.measuring.quality(name)

    def _log_step(self, record: dict[str, Any]) -> None:
        """Log and show a step whose removal is done."""
        self.unfinished, self._saved_step = UnfinishedStep(None), None
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
        with self._rounded_weights():  # those of the exported file are measured
            if self.pruner is not None and self.pruner.is_done and "after_pruning" not in progress.perplexity:
                self.measuring.stage("after_pruning")
            if every and progress.step % every == 0 and progress.tokens < self.config.optimizer.tokens:
                self.measuring.held_out_loss()
        self.unfinished = None

    def _finish(self, write_model: Callable[[], None]) -> bool:
        """Write the last checkpoint and the model, then measure it. Returns False if a signal stopped that."""
        if not self.is_saved:
            self._save_if_there_is_room()
        if self.rounding is not None:  # after the checkpoint, whose weights must stay unrounded for --resume
            reshard(self.trained.loss)
            self.rounding.make_permanent(self.model)
        write_model()
        try:
            self._measure_stage("final")
        except StopRequested as request:
            remedy = "--resume repeats only the measuring" if self.is_saved else "measure it with efficientllm-eval"
            model = self.plan.folder / "model"
            self.display.say(f"stopped by {request} while the final model was measured; {model} is written; {remedy}")
            return False
        return True

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
            name = (self.removal_checkpoint or self.save()).name
            raise DataError(f"{error}; checkpoint {name} is written: repair the text and --resume") from error

    def _step(self) -> dict[str, Any]:
        """Take one optimizer step and the pruning event that is due after it. Return the step's log record."""
        start = time.monotonic()
        record, is_usable = self.training_step.run(self._rounded_weights())
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

    @contextlib.contextmanager
    def _rounded_weights(self) -> Iterator[None]:
        """Round the weights as in the exported file in this block, once quantisation-aware training has started."""
        start = self.config.quantisation.qat_start * self.config.optimizer.tokens
        if self.rounding is None or self.progress.tokens < start:
            yield
            return
        try:
            with self.rounding.applied(self.model):
                yield
        finally:
            reshard(self.trained.loss)  # FSDP gathered rounded weights

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
            self._write_branches(target)
            self._check_score()
            if self.config.optimizer.teacher == "self" and self.trained.loss.teacher is None:
                self._take_teacher()
            if pruner.settings.removals:
                describe = pruner.budget.measure.describe
                sizes = (pruner.size, target, pruner.budget.target)
                self.display.say("removal from {} to {} (target {})".format(*map(describe, sizes)))
        batch_size, report = self.config.optimizer.batch_size, self.display.update
        event = PruningEvent(pruner, self.trained, self.text, batch_size, self.stop_signal, report)
        if event.needs_restart:
            if not self.is_saved and self._is_sound():
                self._save_if_there_is_room()
            if self.is_saved:
                self.removal_checkpoint = self.checkpoint
        self.later_steps.end(self.model)
        # without room for that checkpoint, a signal waits for the end of the event
        with self.stop_signal.held(event.needs_restart and self.removal_checkpoint is None):
            record, vocabulary = event.run(target)
        self.removal_checkpoint = None
        if (self.plan.folder / SIZES_FOLDER).is_dir() and pruner.settings.keeps_later_steps:
            self.later_steps.begin(progress.step, self.model, self.architecture, pruner.survivors)
        if vocabulary is not None:
            self.metrics.write({"step": progress.step, "tokens": progress.tokens, **vocabulary})
        return record

    def _write_branches(self, target: float) -> None:
        """Write the branches of the sizes that the model has and would lose by a removal down to `target`."""
        assert self.pruner is not None
        for size, amount in self.pruner.plan.sizes.items():
            is_reached = self.pruner.size <= amount
            would_be_lost = target < amount
            if not (is_reached and would_be_lost) or has_branch(self.plan.folder, size):
                continue
            if not self.is_saved:
                self.save()
            if self.parallel.is_main:
                write_branch(self.config, size, self.checkpoint, self.progress.tokens)
            self.parallel.barrier()
            self.display.say(f"size {size} is reached: it is finished after the smallest one")

    def _check_score(self) -> None:
        """Score the model, and write a checkpoint to return to. Raises ScoreTooLowError."""
        keeper, pruner, step = self.score_keeper, self.pruner, self.progress.step
        if keeper is None or pruner is None:
            return
        with self._rounded_weights(), evaluated(self.trained, self.text, self.stop_signal.check_alone) as model:
            keeper.check(model, step, self.architecture.num_parameters, pruner.size)
        if not self.is_saved:
            self.save()
        self.kept_checkpoint = self.checkpoint

    def _take_teacher(self) -> None:
        """Make the current model the teacher, and write it into the run's folder (a collective call)."""
        loss = self.trained.loss
        loss.set_teacher(frozen_copy(self.model, loss.dtype, self.parallel.device))
        if self.parallel.is_main:  # a resumed run reads it there, because its own model is pruned by then
            delete_replaced_run(self.plan.folder)
            with folder_written_atomically(self.plan.folder / TEACHER_FOLDER) as temporary:
                save_checkpoint(loss.teacher, self.text.tokenizer, temporary)
        self.parallel.barrier()

    def _is_sound(self) -> bool:
        """Tell whether a checkpoint of the current weights is worth writing."""
        return not self.progress.skipped_in_a_row and self.measuring.is_sound()

    def _save_if_there_is_room(self) -> None:
        """Write a checkpoint if the disk has room for it. Otherwise the previous one stays and the run continues."""
        needed = training_state.state_bytes(self.model, self.trained.optimizer)
        free = shutil.disk_usage(self.plan.folder).free
        if self.parallel.any(self.parallel.is_main and free < needed):
            self.display.say(
                f"no checkpoint of step {self.progress.step}: it takes {format_bytes(needed)}, the disk has "
                f"{format_bytes(free)}; the run continues"
            )
            return
        self.save()

    def _save_stopped(self, request: StopRequested) -> None:
        """Write the checkpoint of a stopped run, unless one from before the current removal replaces it."""
        if self.removal_checkpoint is not None:
            outcome = f"checkpoint {self.removal_checkpoint.name}, before its removal, is written"
        elif not self.progress.step:
            outcome = "nothing was trained yet"
        else:
            outcome = f"checkpoint {self.save().name} is written" if self._is_sound() else "the weights are not finite"
        self.display.say(f"stopped by {request}; {outcome}; continue with --resume")

    def save(self) -> Path:
        """Write a checkpoint of the run and return its folder. A run that --overwrite replaces is deleted first."""
        if self.parallel.is_main:
            delete_replaced_run(self.plan.folder)
        has_own_teacher = self.config.optimizer.teacher == "self" and self.trained.loss.teacher is not None
        extra: dict[str, Any] = {
            "corpora": self.corpora,
            "has_own_teacher": has_own_teacher,
            "ranks": self.parallel.world_size,
            "later_steps": {"removal": self.later_steps.removal, "are_added": self.has_later_steps},
        }
        tensors: dict[str, Any] = {"stream": training_state.as_tensors(self.text.stream.state())}
        own: dict[str, Any] = {}
        if self.unfinished is not None:  # the checkpoint is between a step and its removal or measurements
            extra["unfinished"] = asdict(self.unfinished)
        if self.pruner is not None:
            extra["pruner"] = self.pruner.state_json()
            tensors["pruner"] = self.pruner.state_tensors()
            own = self.pruner.own_tensors()
        if self.rounding is not None:
            tensors["shipped"] = self.rounding.inputs.state_dict()
        state = training_state.TrainingState(self.progress, extra, tensors, own)
        # the one of the last kept score stays, however many newer ones there are: --keep-score may return to it
        folder, keep = self.checkpoint, self.config.run.keep
        optimizer = self.trained.optimizer
        kept = self.kept_checkpoint
        with self.stop_signal.saving():
            training_state.save_training_state(folder, self.model, optimizer, state, keep, self.parallel, kept)
        self._saved_step = self.progress.step
        return folder

    def _restore(self, folder: Path, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint with the JSON values `saved`. The model must already have its shape."""
        self._saved_step = self.progress.step
        tensors, own = training_state.load_training_state(folder, self.model, self.trained.optimizer, self.parallel)
        for path, identity in saved["corpora"].items():
            if self.corpora.get(path, identity) != identity:
                _log.warning(f"--data {path} has changed; the result is not that of the uninterrupted run")
        if saved["has_own_teacher"]:
            teacher, _ = load_source(str(self.plan.folder / TEACHER_FOLDER), "the teacher of the run")
            self.trained.loss.set_teacher(frozen_copy(teacher, self.trained.loss.dtype, self.parallel.device))
        if self.pruner is not None:
            self.pruner.load_state(saved["pruner"], tensors["pruner"], own, self.model)
            survivors = self.pruner.survivors["vocabulary"][0]
            if len(survivors) < self.plan.architecture.vocab_size:
                renumber_settings(self.model.generation_config, survivors.tolist())  # these are still the source's
                switch_vocabulary(self.pruner, self.trained, self.text)
        if self.rounding is not None:
            self.rounding.inputs.load_state_dict(tensors["shipped"])
        self.text.stream.load_state(training_state.as_arrays(tensors["stream"]))
        if "unfinished" in saved:
            self.unfinished = UnfinishedStep(**saved["unfinished"])
        later = saved["later_steps"]
        self.has_later_steps = later["are_added"]
        if self.config.pruning.sizes:
            self.later_steps.removal = later["removal"]
        is_logged = self.unfinished is None or self.unfinished.record is None
        self.metrics.truncate(self.progress, is_logged)
