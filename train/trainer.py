"""The pruning-aware pretraining loop: train, gather saliency from the same gradients, remove, go on."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..runtime.base.errors import DataError, TrainingDivergedError
from ..runtime.base.progress import ProgressDisplay
from ..runtime.base.quantities import format_bytes, format_count
from ..runtime.engines.memory import trim_heap
from .accumulation import accumulate_gradients
from .checkpoint import state as training_state
from .checkpoint.run_folder import checkpoint_folders, drop_replaced, is_replacing
from .compute.distributed import shard_again
from .compute.hardware import HeapWatch
from .compute.loss import LossWeights, TrainingLoss, count_predicted, make_teacher
from .compute.optimizer import clip_factor, gradient_norm, make_optimizer, store_gradients_as_computed
from .data.documents import corpus_fingerprint
from .data.packing import PackedStream
from .measuring import Measuring
from .model.architecture import Architecture
from .model.irregular import architecture_of
from .plan import RunPlan
from .pruning.blocks import BlockProbe
from .pruning.criteria import uses_gradient
from .pruning.pruner import Pruner
from .pruning.selection import Removal
from .quantisation.weights import ShippedWeights
from .reporting.metrics import MetricsWriter, RunProgress, Throughput
from .run_text import RunText
from .schedule import DroppingSchedule, learning_rate
from .stop_signal import StopRequested, StopSignal
from .vocabulary.tokenizer_pruning import renumber_settings

_log = logging.getLogger("efficientllm.train")

MAX_SKIPPED_IN_A_ROW = 10
"""Steps with a non-finite loss or gradient before a run gives up."""


@dataclass(frozen=True)
class UnfinishedStep:
    """A step whose weights are updated. A signal may stop the run before the rest of it is done."""

    record: dict[str, Any] | None
    """What is known of its record before its removal; None where it is written and only measurements are missing."""
    is_usable: bool = True
    """Whether it changed the weights."""
    seconds: float = 0.0
    """That it took."""


class Trainer:
    """One run. The caller has loaded (or rebuilt) the model; `train` does the rest."""

    def __init__(self, plan: RunPlan, loss: TrainingLoss, stream: PackedStream, held_out: np.ndarray) -> None:
        """`held_out` are windows [n, sequence_length + 1]."""
        self.plan, self.config, self.parallel = plan, plan.config, plan.compute.parallel
        self.loss = loss.train()
        self.text = RunText(plan, stream)
        self.corpora = {spec.path: corpus_fingerprint(spec.path) for spec in plan.data}
        """What is read, and what it is now."""
        self.progress, self.speed = RunProgress(), Throughput()
        self._configure_model()
        self.callee = self.parallel.wrap(loss)
        """What is called in a step: the loss itself, or DDP around it."""
        optimizer = self.config.optimizer
        betas, moments = (optimizer.beta1, optimizer.beta2), getattr(torch, optimizer.optimizer_dtype)
        self.optimizer = make_optimizer(self.model, optimizer.learning_rate, betas, optimizer.weight_decay, moments)
        self.schedule: DroppingSchedule | None = None
        self.pruner: Pruner | None = None
        if plan.pruning is not None:
            tokens, settings, budget = self.config.optimizer.tokens, plan.pruning.settings, plan.pruning.budget
            start, end = round(settings.prune_start * tokens), round(settings.prune_end * tokens)
            size = budget.measure.of(plan.architecture)
            self.schedule = DroppingSchedule(size, budget.target, start, end, settings.removals)
            self.pruner = Pruner(plan.pruning, self.model, self.parallel, self.config.run.seed)
        self.ranks_by_gradients = uses_gradient(self.config.pruning.saliency)
        self.shipped: ShippedWeights | None = None
        """Rounds the weights to the type that the run trains for."""
        if self.config.quantisation.is_on:
            self.shipped = ShippedWeights(self.config.quantisation, self.parallel.mean_tensors)
        self.metrics = MetricsWriter(plan.folder, self.config.run, self.parallel.is_main)
        self.stop_signal = StopSignal(self.parallel.any if self.parallel.world_size > 1 else None)
        self.measuring = Measuring(plan, held_out, self.metrics, self.stop_signal)
        self.display = ProgressDisplay(silent=not self.parallel.is_main)
        self.saved_step: int | None = None
        """Step of the newest checkpoint that this process wrote or read."""
        self.unfinished: UnfinishedStep | None = None
        """The step whose weights are updated, while its removal or its measurements are still to be done."""
        self.removal_checkpoint: Path | None = None
        """Checkpoint from before the removal at hand, where that changes the model before all of it is computed."""
        self.has_left_out = False
        """Whether a step of this process learned nothing, which is said once."""
        self.heap = HeapWatch()

    @property
    def model(self) -> Any:
        return self.loss.model

    @property
    def architecture(self) -> Architecture:
        """The shape without the groups that are removed, physically or not yet."""
        return self.pruner.architecture if self.pruner is not None else architecture_of(self.model.config)

    def _configure_model(self) -> None:
        """Execution settings of a new (or newly shaped) model."""
        if self.config.run.activation_checkpointing:
            self.model.activation_checkpointing_enable()
        if self.config.run.compile:
            torch._dynamo.reset()  # code of the old shapes
            self.model.model.compile()
        if self.plan.stores_gradients_as_computed:
            store_gradients_as_computed(self.model)

    def train(self, write_model: Callable[[], None]) -> bool:
        """Run to the last token, write a checkpoint and (by `write_model`, a collective call) the model; measure it.

        Return False when a signal stopped the run early; it says what is kept and what to do.
        """
        try:
            with self.stop_signal, self.display as display:
                try:
                    self._loop(display)
                except StopRequested as request:
                    self._save_stopped(request, display)
                    return False
                return self._finish(display, write_model)
        finally:
            self.metrics.close()

    def _loop(self, display: ProgressDisplay) -> None:
        """Train to the last token; StopRequested where a signal came."""
        every = self.config.run.checkpoint_every
        if "source" not in self.progress.perplexity:
            self.measuring.stage("source", self.callee, self.progress, display)
            self.stop_signal.check()
            self.measuring.quality("source", self.model, self.progress, display)
        if self.unfinished is not None:
            if self.unfinished.record is not None:
                self._note(self._with_removal(self.unfinished), display)
            self._measure(display)
        while self.progress.tokens < self.config.optimizer.tokens:
            self._note(self._step_or_save(), display)
            self._measure(display)
            self.stop_signal.check()
            is_due = every and self.progress.step % every == 0 and self.progress.tokens < self.config.optimizer.tokens
            if is_due and self._is_sound():
                self._save_if_there_is_room(display)
        if not self._is_sound():
            raise TrainingDivergedError(
                f"the run ended at step {self.progress.step} with weights that give no finite loss; no model is "
                f"written: {self._way_on()}"
            )
        if self.pruner is not None:
            self._compact()

    def _note(self, record: dict[str, Any], display: ProgressDisplay) -> None:
        """Log and show a step whose removal is done."""
        self.unfinished, self.saved_step = UnfinishedStep(None), None
        self.heap.look()
        self.metrics.write(record)
        self._show(display, record)

    def _measure(self, display: ProgressDisplay) -> None:
        """Measure what is due after a step; StopRequested leaves it to the resumed run."""
        with self._as_shipped():
            if self.pruner is not None and self.pruner.is_done and "after_pruning" not in self.progress.perplexity:
                self.measuring.stage("after_pruning", self.callee, self.progress, display)
            self.measuring.held_out_loss_if_due(self.callee, self.progress)
        self.unfinished = None

    def _save_stopped(self, request: StopRequested, display: ProgressDisplay) -> None:
        """Write the checkpoint of a run that a signal stopped, unless there is one of this place; say what is kept."""
        if self.removal_checkpoint is not None:
            outcome = f"checkpoint {self.removal_checkpoint.name}, before its removal, is written"
        elif not self.progress.step:
            outcome = "nothing was trained yet"
        else:
            outcome = f"checkpoint {self.save().name} is written" if self._is_sound() else "the weights went bad"
        display.say(f"stopped by {request}; {outcome}; continue with --resume")

    def _finish(self, display: ProgressDisplay, write_model: Callable[[], None]) -> bool:
        """Write the last checkpoint and the model before the model is measured; False when a signal stopped that."""
        if self.saved_step != self.progress.step:
            self._save_if_there_is_room(display)
        if self.shipped is not None:
            shard_again(self.loss)
            self.shipped.settle(self.model)
        write_model()
        try:
            self.measuring.stage("final", self.callee, self.progress, display)
            self.stop_signal.check()
            self.measuring.quality("final", self.model, self.progress, display)
        except StopRequested as request:
            is_saved = self.saved_step == self.progress.step
            remedy = "--resume repeats only the measuring" if is_saved else "measure it with efficientllm-eval"
            model = self.plan.folder / "model"
            display.say(f"stopped by {request} while the final model was measured; {model} is written; {remedy}")
            return False
        return True

    def _way_on(self) -> str:
        """What to do after a divergence."""
        if checkpoint_folders(self.plan.folder / "checkpoints"):
            return "the last checkpoint is intact: --resume with a lower --learning-rate"
        return "begin anew with a lower --learning-rate"

    def _step_or_save(self) -> dict[str, Any]:
        """Take one step and return its record.

        Where a signal comes before the weights are updated, the run is as before the step. Where the text cannot be read on, what was trained so far is saved first, unless it would take the place of an
        old run: then that one is worth more.
        """
        undo = self._undo_of_step()
        try:
            return self._step()
        except StopRequested:
            if self.unfinished is None:
                undo()
            raise
        except DataError as error:
            if is_replacing(self.plan.folder):
                raise
            if self.unfinished is None:
                undo()
            name = (self.removal_checkpoint or self.save()).name
            raise DataError(f"{error}; checkpoint {name} is written: mend the text and --resume") from error

    def _undo_of_step(self) -> Callable[[], None]:
        """Return what puts everything back that a step changes before it updates the weights."""
        position, random = self.text.stream.state(), torch.get_rng_state()
        of_gpu = torch.cuda.get_rng_state(self.parallel.device) if self.parallel.device.type == "cuda" else None
        grams = self.pruner.copy_of_grams() if self.pruner is not None and self._checks_amid_steps else None

        def undo() -> None:
            self.text.stream.load_state(position)
            torch.set_rng_state(random)
            if of_gpu is not None:
                torch.cuda.set_rng_state(of_gpu, self.parallel.device)
            self.optimizer.zero_grad(set_to_none=True)
            if self.pruner is not None:
                self.pruner.discard_step(grams)

        return undo

    @property
    def _checks_amid_steps(self) -> bool:
        """Whether a signal is answered between the microbatches of a step."""
        return self.config.optimizer.gradient_accumulation > 1 and self.parallel.world_size == 1

    def _is_sound(self) -> bool:
        """Whether a checkpoint of the weights as they are now is worth writing."""
        return not self.progress.skipped_in_a_row and self.measuring.is_sound(self.callee)

    def _save_if_there_is_room(self, display: ProgressDisplay) -> None:
        """A checkpoint that the disk does not hold is left out; the one before stays and the run goes on."""
        needed = training_state.state_bytes(self.model, self.optimizer)
        free = shutil.disk_usage(self.plan.folder).free
        if self.parallel.any(self.parallel.is_main and free < needed):
            display.say(
                f"no checkpoint of step {self.progress.step}: it takes {format_bytes(needed)}, the disk has "
                f"{format_bytes(free)}; the run goes on"
            )
            return
        self.save()

    def _show(self, display: ProgressDisplay, record: dict[str, Any]) -> None:
        """Tokens, loss, parameters left and speed."""
        done, total = self.progress.tokens, self.config.optimizer.tokens
        self.speed.add(self.tokens_per_step, record["seconds"])
        text = (
            f"{format_count(done)}/{format_count(total)} tokens  loss {record['loss']:.3f}  "
            f"{format_count(record['parameters'])} parameters  {self.speed.tokens_per_second:.0f} tokens/s"
        )
        display.update("training", done, total, text)

    def _step(self) -> dict[str, Any]:
        """Take one optimizer step and, where one is due, one pruning event; returns the step's record."""
        began = time.monotonic()
        microbatches = [self._next_rows() for _ in range(self.config.optimizer.gradient_accumulation)]
        loss = self.parallel.mean(self._accumulate_gradients(microbatches))
        grad_norm = gradient_norm(self.model.parameters())
        record: dict[str, Any] = {"step": self.progress.step + 1, "loss": loss, "grad_norm": float(grad_norm)}
        is_usable = math.isfinite(loss) and math.isfinite(record["grad_norm"])
        if not is_usable:
            self._skip(record)
        elif not self.parallel.any(any(map(count_predicted, microbatches))):
            is_usable = False
            self._leave_out(record)
        else:
            self._update_weights(grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens += self.tokens_per_step
        record |= {"tokens": self.progress.tokens, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        seconds = time.monotonic() - began
        self.progress.seconds += seconds
        self.unfinished = UnfinishedStep(record, is_usable, seconds)
        return self._with_removal(self.unfinished)

    def _with_removal(self, step: UnfinishedStep) -> dict[str, Any]:
        """Remove what is due after a step; returns the step's record."""
        assert step.record is not None
        began = time.monotonic()
        removed = self._prune() if step.is_usable else {}
        elapsed = time.monotonic() - began
        self.progress.seconds += elapsed
        sizes = {"parameters": self.architecture.num_parameters, **self._milliseconds()}
        return {**step.record, **sizes, **removed, "seconds": round(step.seconds + elapsed, 4)}

    def _milliseconds(self) -> dict[str, float]:
        """What the device that the run prunes for takes by now, by its profile; {} where there is none."""
        time = self.plan.pruning.time if self.plan.pruning is not None else None
        return {"ms": round(time.measure.of(self.architecture), 4)} if time is not None else {}

    @property
    def tokens_per_step(self) -> int:
        settings = self.config.optimizer
        sequences = settings.batch_size * settings.gradient_accumulation * self.parallel.world_size
        return sequences * self.config.source.sequence_length

    def _accumulate_gradients(self, microbatches: Sequence[Tensor]) -> float:
        """Gradients of windows [B, S + 1]; returns this rank's loss."""
        self.loss.weights = self._loss_weights()
        with self._as_shipped():
            check = self.stop_signal.check_alone
            return accumulate_gradients(self.callee, self.model, microbatches, self.pruner, self.parallel, check)

    def _loss_weights(self) -> LossWeights:
        """As configured; while groups are ranked by gradients, with at least the whole cross-entropy: the gradient of
        distillation is zero at the source, and what of it rounding leaves ranks nothing."""
        settings = self.config.optimizer
        if self.ranks_by_gradients and self.pruner is not None and not self.pruner.is_done:
            return LossWeights(max(1.0, settings.cross_entropy), settings.distill)
        return LossWeights(settings.cross_entropy, settings.distill)

    @contextlib.contextmanager
    def _as_shipped(self) -> Iterator[None]:
        """Within, the model's weights are those of the file, where it is time for that."""
        start = self.config.quantisation.qat_start * self.config.optimizer.tokens
        if self.shipped is None or self.progress.tokens < start:
            yield
            return
        try:
            with self.shipped.applied(self.model):
                yield
        finally:
            shard_again(self.loss)  # what was gathered is rounded

    def _next_rows(self) -> Tensor:
        """This rank's windows [B, S + 1] of the next microbatch."""
        rows = self.text.stream.next_windows(self.config.optimizer.batch_size * self.parallel.world_size)
        return torch.from_numpy(self.parallel.my_rows(rows)).to(self.parallel.device)

    def _update_weights(self, grad_norm: Tensor) -> None:
        if self.pruner is not None:
            self.pruner.finish_step()
        settings = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.progress.tokens + self.tokens_per_step)
        self.optimizer.step(gradient_scale=clip_factor(grad_norm, settings.max_grad_norm))
        self.progress.skipped_in_a_row = 0

    def _skip(self, record: dict[str, Any]) -> None:
        """Drop the step's gradients and saliency; too many in a row end the run."""
        record["skipped"] = True
        if self.pruner is not None:
            self.pruner.discard_step()
        self.progress.skipped_in_a_row += 1
        if self.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDivergedError(
                f"loss {record['loss']} with gradient norm {record['grad_norm']} for {MAX_SKIPPED_IN_A_ROW} steps in a "
                f"row at step {record['step']}; {self._way_on()}"
            )

    def _leave_out(self, record: dict[str, Any]) -> None:
        """A step that learned nothing changes nothing, and says nothing of any group."""
        record["nothing_to_learn"] = True
        if self.pruner is not None:
            self.pruner.discard_step()
        if not self.has_left_out:
            _log.warning(
                f"step {record['step']}: its windows hold no answer's token to learn; such steps change nothing, and a "
                "longer --sequence-length or larger --batch-size makes fewer of them"
            )
        self.has_left_out = True

    def _prune(self) -> dict[str, Any]:
        """Remove what the schedule asks for by now; returns what to log of it.

        A signal is answered where the run can go on from exactly here: while the model is as it was, between two rounds
        of one ranking, and, where more follows once the model is changed, from a checkpoint that is written before.
        """
        pruner, settings = self.pruner, self.config.pruning
        if pruner is None or pruner.is_done or self.schedule is None:
            return {}
        if self.progress.step % settings.prune_every and self.progress.tokens < self.schedule.end_tokens:
            return {}
        target = self.schedule.target_at(self.progress.tokens)
        if not pruner.is_above(target):
            return {}
        needs_checkpoint = settings.recover != "none" or pruner.wants_rows
        if needs_checkpoint and self.saved_step != self.progress.step and self._is_sound():
            self._save_if_there_is_room(self.display)
        if needs_checkpoint and self.saved_step == self.progress.step:
            self.removal_checkpoint = training_state.checkpoint_folder(self.plan.folder, self.progress)
        with self.stop_signal.held(needs_checkpoint and self.removal_checkpoint is None):
            found = self._removed(pruner, target)
        self.removal_checkpoint = None
        return found

    def _removed(self, pruner: Pruner, target: float) -> dict[str, Any]:
        """Remove until the budget's measure is at most `target`, and recover; returns what to log of it."""
        settings = self.config.pruning
        whole = make_teacher(self.model, self.loss.dtype, self.parallel.device) if settings.recover != "none" else None
        rows = self._prune_rows() if pruner.wants_rows else None
        removal = pruner.remove(target, self.optimizer, self._block_probe())
        if removal is not None and (pruner.is_done or pruner.events_since_compaction >= settings.compact_every):
            self._compact()
        if removal is not None and whole is not None:
            kept = rows.kept["vocabulary"][0] if rows is not None else None
            windows, check = self.text.recovery_windows, self.stop_signal.check
            pruner.recover(whole, removal, windows, self.loss.dtype, kept, check)
        units = [unit for each in (rows, removal) if each is not None for unit in each.units]
        removed = [[unit.kind, *part] for unit in units for part in unit.parts]
        return {"removed": removed, "next_saliency": pruner.next_saliency} if units else {}

    def _prune_rows(self) -> Removal | None:
        """Remove vocabulary rows, and read on without them; None where the ranking takes none."""
        assert self.pruner is not None
        rows = self.text.row_probe(self.loss, self.stop_signal)
        removal = self.pruner.remove_rows(rows, self._block_probe())
        if removal is not None:
            self._compact()
            self._read_on_without_rows()
            found = rows.describe(removal.kept["vocabulary"][0])
            self.metrics.write({"step": self.progress.step, "tokens": self.progress.tokens, **found})
        return removal

    def _read_on_without_rows(self) -> None:
        """Read all text with the tokenizer of the rows that survive."""
        assert self.pruner is not None
        self.text.go_on_without_rows(self.pruner.survivors["vocabulary"][0].tolist(), self.loss)
        self.measuring.read_with(self.text.tokenizer)

    def _block_probe(self) -> BlockProbe | None:
        """Measures blocks of the model as it is; None where none are to be measured."""
        if self.pruner is None or self.pruner.blocks is None:
            return None
        windows, batch_size = self.text.block_windows, self.config.optimizer.batch_size
        return BlockProbe(self.loss, windows, batch_size, self.parallel, self.stop_signal.check)

    def _compact(self) -> None:
        """Make zeroed groups disappear from the tensors."""
        assert self.pruner is not None
        if self.pruner.pending is None:
            return
        self.callee = nn.Identity()  # DDP's hooks on the old parameters go with it
        self.loss, self.callee = self.pruner.compact(self.loss, self.optimizer)
        trim_heap()  # tensors of the new widths do not fit where those of the old ones were
        self.heap.begin_anew()
        self._configure_model()

    def save(self) -> Path:
        """Write a checkpoint of the run; one that it replaces makes room."""
        if self.parallel.is_main:
            drop_replaced(self.plan.folder)
        extra: dict[str, Any] = {"corpora": self.corpora}
        if self.unfinished is not None:
            extra["unfinished"] = asdict(self.unfinished)
        tensors: dict[str, Any] = {"stream": training_state.as_tensors(self.text.stream.state())}
        if self.pruner is not None:
            extra["pruner"] = self.pruner.state_json()
            tensors["pruner"] = self.pruner.state_tensors()
        if self.shipped is not None:
            tensors["shipped"] = self.shipped.inputs.state_dict()
        state = training_state.TrainingState(self.progress, extra, tensors)
        folder, keep = training_state.checkpoint_folder(self.plan.folder, self.progress), self.config.run.keep
        written = training_state.save_training_state(folder, self.model, self.optimizer, state, keep, self.parallel)
        self.saved_step = self.progress.step
        return written

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint; the model must already have its shape."""
        self.progress, extra = training_state.read_trainer_json(folder)
        self.saved_step = self.progress.step
        tensors = training_state.load_training_state(folder, self.model, self.optimizer, self.parallel)
        for path, identity in extra.get("corpora", {}).items():
            if self.corpora.get(path, identity) != identity:
                _log.warning(f"--data {path} is not what it was; the result is not that of the uninterrupted run")
        if self.pruner is not None:
            self.pruner.load_state(extra["pruner"], tensors["pruner"], self.model)
            survivors = self.pruner.survivors["vocabulary"][0]
            if len(survivors) < self.plan.architecture.vocab_size:
                renumber_settings(self.model.generation_config, survivors.tolist())  # it is the source's
                self._read_on_without_rows()
        if self.shipped is not None:
            self.shipped.inputs.load_state_dict(tensors.get("shipped", {}))  # none in an earlier release's
        self.text.stream.load_state(training_state.as_arrays(tensors["stream"]))
        if "unfinished" in extra:
            self.unfinished = UnfinishedStep(**extra["unfinished"])
        is_recorded = self.unfinished is None or self.unfinished.record is None
        self.metrics.truncate(self.progress, is_recorded)
