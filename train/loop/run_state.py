"""State of a training run: model, pruning, text and logs, the parts of its checkpoints and its milestones."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ...runtime.base.progress import ProgressDisplay
from ..checkpoint import state as training_state
from ..checkpoint.milestone import Milestone
from ..checkpoint.state import PartState
from ..checkpoint.writer import Checkpoints, Part
from ..compute.distributed import reshard
from ..compute.loss import TrainingLoss, perplexity
from ..compute.optimizer import make_optimizer
from ..compute.stop_signal import StopSignal
from ..compute.trained_model import TrainedModel, configure
from ..data.documents import corpus_fingerprint
from ..evaluation.torch_model import TorchModel
from ..family.later_steps import AddLaterSteps, RecordLaterSteps
from ..family.score_keeper import ScoreCheck, ScoreKeeper
from ..family.sizes import Branches
from ..model.architecture import Architecture
from ..model.irregular import architecture_of
from ..pruning.plan import DroppingSchedule
from ..pruning.pruner import Pruner
from ..quantisation.weights import RoundedWeights
from ..reporting.metrics import MetricsWriter, RunProgress, Throughput
from ..vocabulary.tokenizer_pruning import renumber_settings
from .measuring import Measuring, evaluated
from .plan import RunPlan
from .pruning_event import switch_vocabulary
from .run_text import RunText
from .training_step import TrainingStep

_log = logging.getLogger("efficientllm.train")

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


class RunState:
    """One run whose model is loaded or rebuilt."""

    def __init__(
        self, plan: RunPlan, loss: TrainingLoss, text: RunText, read_weights: Callable[[Any], None] | None = None
    ) -> None:
        """Prepare the run of `plan`, and restore its checkpoint if there is one.

        `read_weights` fills a model on the meta device after it is sharded.
        """
        self.plan, self.config, self.parallel, self.text = plan, plan.config, plan.compute.parallel, text
        optimizer, run = self.config.optimizer, self.config.run
        self.progress = RunProgress()
        if plan.resume is not None:
            self.progress, _ = training_state.read_trainer_json(plan.resume.checkpoint)
        self.trained = _trained_model(plan, loss, read_weights)
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
        self.display, self.throughput = ProgressDisplay(silent=not self.parallel.is_main), Throughput()
        self.stop_signal = signal = StopSignal(
            self.parallel.any if self.parallel.world_size > 1 else None, self.display.say
        )
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
        self.checkpoints = Checkpoints(plan.folder, run.keep, self.trained, self.progress, self.display, signal.saving)
        self.score_keeper: ScoreKeeper | None = None
        if self.config.score.task:
            self.score_keeper = ScoreKeeper(self.config.score, plan.folder, plan.resume is not None, self.display)
        self.milestones: list[Milestone] = []
        self._add_parts()
        if plan.resume is not None:
            self.checkpoints.load(plan.resume.checkpoint)
            is_logged = self.unfinished is None or self.unfinished.record is None
            self.metrics.truncate(self.progress, is_logged)

    def _add_parts(self) -> None:
        """Add the milestones of the run, and the parts of its checkpoints in the order in which they are loaded."""
        parts = self.checkpoints.parts
        corpora = {spec.path: corpus_fingerprint(spec.path) for spec in self.plan.data}
        parts["corpora"] = Part(lambda: PartState(corpora), partial(_warn_of_changes, corpora))
        if self.pruner is not None:
            parts["pruner"] = Part(self.pruner.state, self._load_pruner)
            if self.config.pruning.sizes:
                self.milestones.append(Branches(self.config, self.pruner, self.checkpoints))
            if self.score_keeper is not None:
                check = ScoreCheck(self.score_keeper, self.pruner, self.checkpoints, self._evaluated)
                self.milestones.append(check)
        if self.rounding is not None:
            inputs = self.rounding.inputs
            parts["rounding"] = Part(
                lambda: PartState(tensors=inputs.state_dict()), lambda state: inputs.load_state_dict(state.tensors)
            )
        stream = self.text.stream
        parts["stream"] = Part(
            lambda: PartState(tensors=training_state.as_tensors(stream.state())),
            lambda state: stream.load_state(training_state.as_arrays(state.tensors)),
        )
        # the step between whose update and removal or measurements the checkpoint is, if it is
        parts["step"] = Part(lambda: PartState(self.unfinished and asdict(self.unfinished)), self._load_unfinished)
        later = self._later_steps()
        if later is not None:
            parts["later_steps"] = Part(later.state, later.load)
            self.milestones.append(later)

    def _later_steps(self) -> RecordLaterSteps | AddLaterSteps | None:
        """Return the milestone of later steps: of a run with --sizes, of a larger size, or None."""
        if self.pruner is None:
            return None
        if self.config.pruning.sizes:
            return RecordLaterSteps(self.plan.folder, self.pruner, self.trained, self.progress)
        if not self.config.run.branch_of:
            return None
        return AddLaterSteps(self.checkpoints, self.pruner, self._trial_perplexity)

    def _trial_perplexity(self) -> Callable[[], float]:
        """Return a function that measures the perplexity on some text of training."""
        windows, batch_size = self.text.extra_windows(TRIAL_TOKENS), self.config.optimizer.batch_size
        check = self.stop_signal.check
        return partial(perplexity, self.trained.loss, windows, batch_size, self.parallel.device, check)

    @property
    def model(self) -> Any:
        return self.trained.model

    @property
    def architecture(self) -> Architecture:
        """Return the shape without removed groups."""
        return self.pruner.architecture if self.pruner is not None else architecture_of(self.model.config)

    @contextlib.contextmanager
    def rounded_weights(self) -> Iterator[None]:
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

    @contextlib.contextmanager
    def _evaluated(self) -> Iterator[TorchModel]:
        """Yield the model for answers, with the weights of the exported file."""
        with self.rounded_weights(), evaluated(self.trained, self.text, self.stop_signal.check_alone) as model:
            yield model

    def _load_unfinished(self, state: PartState) -> None:
        if state.values is not None:
            self.unfinished = UnfinishedStep(**state.values)

    def _load_pruner(self, state: PartState) -> None:
        assert self.pruner is not None
        self.pruner.load(state, self.model)
        survivors = self.pruner.survivors["vocabulary"][0]
        if len(survivors) < self.plan.architecture.vocab_size:
            renumber_settings(self.model.generation_config, survivors.tolist())  # these are still the source's
            switch_vocabulary(self.pruner, self.trained, self.text)


def _trained_model(plan: RunPlan, loss: TrainingLoss, read_weights: Callable[[Any], None] | None) -> TrainedModel:
    """Return model, loss and optimizer of a run.

    Both are configured by functions, because the loss is wrapped between the two, and a compacted model is configured
    again.
    """
    optimizer, run = plan.config.optimizer, plan.config.run
    return TrainedModel(
        loss,
        plan.compute.parallel,
        partial(
            configure,
            device=plan.compute.parallel.device,
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


def _warn_of_changes(corpora: dict[str, Any], state: PartState) -> None:
    """Warn of corpora whose fingerprint differs from that in a checkpoint."""
    for path, identity in state.values.items():
        if corpora.get(path, identity) != identity:
            _log.warning(f"--data {path} has changed; the result is not that of the uninterrupted run")
