"""The pruning-aware pretraining loop: train, gather saliency from the same gradients, remove, go on."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..runtime.errors import TrainingDivergedError
from . import checkpoint
from .architecture import Architecture
from .checkpoint import Progress
from .config import TrainConfig
from .hardware import Hardware
from .loss import next_token_loss, perplexity
from .models import architecture_of
from .packing import PackedStream
from .progress import ProgressDisplay
from .saliency import SaliencyTracker, criterion_named
from .schedule import DroppingSchedule, learning_rate_factor
from .selection import Kept, Removal, SelectionRules, all_groups, select_removal
from .surgery import remove_groups

MAX_SKIPPED_IN_A_ROW = 10
"""Steps with a non-finite loss or gradient before a run gives up."""


class Trainer:
    """One run. The caller has loaded (or rebuilt) the model; `train` does the rest."""

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        stream: PackedStream,
        held_out: np.ndarray,
        schedule: DroppingSchedule | None,
        hardware: Hardware,
        folder: Path,
    ) -> None:
        """`schedule` is None for a run that only trains; `held_out` are windows [n, sequence_length + 1]."""
        self.config = config
        self.model = model.to(hardware.device).train()
        self.tokenizer = tokenizer
        self.stream = stream
        self.held_out = held_out
        self.schedule = schedule
        self.hardware = hardware
        self.folder = folder
        self.progress = Progress()
        self.optimizer = make_optimizer(self.model, config)
        self.rules = SelectionRules(config.pruning.kinds, config.pruning.width_multiple)
        architecture = self.architecture
        self.tracker: SaliencyTracker | None = None
        if schedule is not None:
            criterion = criterion_named(config.pruning.saliency)
            decay, seed = config.pruning.saliency_decay, config.run.seed
            self.tracker = SaliencyTracker(criterion, self.rules.kinds, architecture, decay, seed)
        self.survivors: Kept = all_groups(architecture)
        """Surviving groups as positions in the source model."""
        self._stop_signal: int | None = None

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.model.config)

    @property
    def num_parameters(self) -> int:
        return self.architecture.num_parameters

    def train(self) -> bool:
        """Run to the last token; False when a signal stopped it early (its checkpoint is written)."""
        restore = self._catch_signals()
        try:
            with ProgressDisplay(self.config.optimizer.tokens, self.progress.tokens) as display:
                return self._loop(display)
        finally:
            restore()

    def _loop(self, display: ProgressDisplay) -> bool:
        every = self.config.run.checkpoint_every
        if "source" not in self.progress.perplexity:
            self._measure_perplexity("source", display)
        while self.progress.tokens < self.config.optimizer.tokens:
            record = self._step()
            self._log(record)
            display.update(self.progress.tokens, record["loss"], record["parameters"])
            if self._pruning_is_done() and "after_pruning" not in self.progress.perplexity:
                self._measure_perplexity("after_pruning", display)
            if self._stop_signal is not None:
                path = self.save()
                name = signal.Signals(self._stop_signal).name
                display.say(f"stopped by {name}; checkpoint {path.name} is written; continue with --resume")
                return False
            is_due = every and self.progress.step % every == 0 and not self.progress.skipped_in_a_row
            if is_due and self.progress.tokens < self.config.optimizer.tokens:
                self.save()
        self._measure_perplexity("final", display)
        return True

    def _pruning_is_done(self) -> bool:
        return self.schedule is not None and self.num_parameters <= self.schedule.target_params

    def _measure_perplexity(self, stage: str, display: ProgressDisplay) -> None:
        value = perplexity(self.model, self.held_out, self.config.optimizer.batch_size, self.hardware.dtype)
        self.progress.perplexity[stage] = value
        self._log({"step": self.progress.step, "tokens": self.progress.tokens, f"perplexity_{stage}": value})
        display.say(f"held-out perplexity, {stage.replace('_', ' ')}: {value:.2f}")

    def _step(self) -> dict[str, Any]:
        """One optimizer step and, where one is due, one pruning event."""
        began = time.monotonic()
        loss = self._accumulate_gradients()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        record: dict[str, Any] = {"step": self.progress.step + 1, "loss": loss, "grad_norm": float(grad_norm)}
        if math.isfinite(loss) and math.isfinite(record["grad_norm"]):
            self._update_weights(grad_norm)
        else:
            self._skip(record)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        sequences = self.config.optimizer.batch_size * self.config.optimizer.gradient_accumulation
        self.progress.tokens += sequences * self.config.source.sequence_length
        removal = self._prune()
        elapsed = time.monotonic() - began
        self.progress.seconds += elapsed
        record |= {
            "tokens": self.progress.tokens,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "parameters": self.num_parameters,
            "removed": [[unit.kind, unit.layer, len(unit.indices)] for unit in removal.units] if removal else [],
            "seconds": round(elapsed, 4),
        }
        return record

    def _accumulate_gradients(self) -> float:
        """Gradients of the mean loss over all microbatches, in .grad; returns that loss."""
        steps = self.config.optimizer.gradient_accumulation
        per_microbatch = self.tracker is not None and self.tracker.criterion.per_microbatch and steps > 1
        held: dict[Tensor, Tensor] = {}
        total = 0.0
        for _ in range(steps):
            windows = torch.from_numpy(self.stream.next_windows(self.config.optimizer.batch_size))
            loss = next_token_loss(self.model, windows.to(self.hardware.device), self.hardware.dtype)
            (loss if per_microbatch else loss / steps).backward()
            total += float(loss.detach())
            if per_microbatch:
                assert self.tracker is not None
                self.tracker.accumulate(self.model.named_parameters())
                for parameter in self.model.parameters():
                    gradient = parameter.grad
                    parameter.grad = None
                    held[parameter] = gradient if parameter not in held else held[parameter].add_(gradient)
        if per_microbatch:
            for parameter, gradient in held.items():
                parameter.grad = gradient.div_(steps)
        elif self.tracker is not None:
            self.tracker.accumulate(self.model.named_parameters())
        return total / steps

    def _update_weights(self, grad_norm: Tensor) -> None:
        if self.tracker is not None:
            self.tracker.finish_step()
        settings = self.config.optimizer
        factor = learning_rate_factor(
            self.progress.tokens,
            settings.tokens,
            round(settings.lr_warmup * settings.tokens),
            round((1 - settings.lr_decay) * settings.tokens),
            settings.lr_schedule,
            settings.lr_floor,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), settings.max_grad_norm, grad_norm)
        self.optimizer.step()
        self.progress.skipped_in_a_row = 0

    def _skip(self, record: dict[str, Any]) -> None:
        """Drop the step's gradients and saliency; too many in a row end the run."""
        record["skipped"] = True
        if self.tracker is not None:
            self.tracker.discard_step()
        self.progress.skipped_in_a_row += 1
        if self.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDivergedError(
                f"loss {record['loss']} with gradient norm {record['grad_norm']} for {MAX_SKIPPED_IN_A_ROW} steps in a "
                f"row at step {record['step']}; the last checkpoint is intact: lower --learning-rate and --resume"
            )

    def _prune(self) -> Removal | None:
        """Remove what the schedule asks for by now; None where nothing is due."""
        if self.schedule is None or self.tracker is None or not self.tracker.num_observations:
            return None
        if self.progress.step % self.config.pruning.prune_every:
            return None
        allowed = self.schedule.params_at(self.progress.tokens)
        if self.num_parameters <= allowed:
            return None
        removal = select_removal(self.architecture, self.tracker.scores, self.rules, allowed)
        if not removal.units:
            return None
        remove_groups(self.model, removal, self.optimizer)
        self.tracker.keep(removal.after, removal.kept)
        for kind, layers in removal.kept.items():
            self.survivors[kind] = [before[kept] for before, kept in zip(self.survivors[kind], layers, strict=True)]
        if self.num_parameters <= self.schedule.target_params:
            self.tracker = None  # the architecture is final
        return removal

    def _log(self, record: dict[str, Any]) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def save(self) -> Path:
        """Write a checkpoint of the run."""
        tensors = self.tracker.state_dict() if self.tracker is not None else {}
        return checkpoint.save_training_state(
            self.folder / "checkpoints",
            self.model,
            self.optimizer,
            self.progress,
            {"stream": self.stream.state_dict(), "survivors": survivors_to_json(self.survivors)},
            tensors,
            self.config.run.keep,
        )

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint; the model must already have its shape."""
        self.progress, extra = checkpoint.read_trainer_json(folder)
        tensors = checkpoint.load_training_state(folder, self.model, self.optimizer)
        self.stream.load_state_dict(extra["stream"])
        self.survivors = {
            kind: [torch.tensor(layer, dtype=torch.int64) for layer in layers]
            for kind, layers in extra["survivors"].items()
        }
        if self._pruning_is_done():
            self.tracker = None
        elif self.tracker is not None and tensors:
            self.tracker.load_state_dict(tensors)
        truncate_metrics(self.folder / "metrics.jsonl", self.progress)

    def _catch_signals(self) -> Callable[[], None]:
        """Let SIGINT and SIGTERM finish the step and write a checkpoint; returns a function that undoes this."""

        def remember(number: int, frame: object) -> None:
            if self._stop_signal is not None:
                raise KeyboardInterrupt
            self._stop_signal = number

        previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        return restore


def survivors_to_json(survivors: Kept) -> dict[str, list[list[int]]]:
    return {kind: [layer.tolist() for layer in layers] for kind, layers in survivors.items()}


def make_optimizer(model: Any, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only."""
    settings = config.optimizer
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True)


def truncate_metrics(path: Path, progress: Progress) -> None:
    """Drop what a killed run logged after the checkpoint that is resumed."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut off by the kill
            continue
        stage = next((key for key in record if key.startswith("perplexity_")), None)
        seen = stage is None or stage.removeprefix("perplexity_") in progress.perplexity
        if record["step"] <= progress.step and seen:
            kept.append(line)
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
