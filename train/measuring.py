"""What is measured of a run's model on the way: held-out perplexity, and at both ends what it keeps of its source."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..runtime.base.errors import DataError
from ..runtime.base.progress import ProgressDisplay
from ..runtime.engines.contract_text import one_line
from .compute.loss import perplexity
from .data.packing import held_out_windows
from .evaluation.quality.contract import Quality, contract, measure_quality
from .evaluation.torch_model import TorchModel
from .plan import RunPlan
from .reporting.metrics import MetricsWriter, RunProgress
from .stop_signal import StopSignal
from .vocabulary.retokenization import ByteTokenizer

QUALITY_BATCH_TOKENS = 2048
"""Tokens per forward pass."""


class Measuring:
    """The measurements of one run; their values go into its progress and its metrics."""

    def __init__(self, plan: RunPlan, held_out: np.ndarray, metrics: MetricsWriter, stop_signal: StopSignal) -> None:
        """`held_out` are windows [n, S + 1]. Every measurement but `is_sound` raises StopRequested on a signal."""
        self.plan, self.held_out, self.metrics, self.stop_signal = plan, held_out, metrics, stop_signal
        self.tokenizer = plan.tokenizer

    def read_with(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Go on with windows of the same text in another tokenizer."""
        settings = self.plan.config.source
        length, fraction, tokens = settings.sequence_length, settings.held_out_fraction, settings.eval_tokens
        self.tokenizer = tokenizer
        self.held_out = held_out_windows(self.plan.data, tokenizer, length, fraction, tokens)

    @cached_property
    def _prunes_vocabulary(self) -> bool:
        return self.plan.pruning is not None and self.plan.pruning.pieces is not None

    def bits_per_byte(self, perplexity: float) -> float:
        """Of what the held-out windows predict: comparable where a vocabulary shrinks, which perplexity is not."""
        tokens = self.held_out[:, 1:]
        predicted, reading = tokens[tokens >= 0], ByteTokenizer(self.tokenizer)
        size = sum(len(reading.bytes.get(int(token), b"")) for token in predicted)
        return math.log2(perplexity) * predicted.size / max(1, size)

    def held_out_perplexity(self, loss: nn.Module) -> float:
        batch_size, device = self.plan.config.optimizer.batch_size, self.plan.compute.parallel.device
        return perplexity(loss, self.held_out, batch_size, device, self.stop_signal.check)

    def is_sound(self, loss: nn.Module) -> bool:
        """Whether the weights as they are now give a finite loss: a checkpoint of others would only fail again."""
        rows = self.held_out[(self.held_out[:, 1:] >= 0).any(1)][: self.plan.config.optimizer.batch_size]
        return math.isfinite(perplexity(loss, rows, len(rows), self.plan.compute.parallel.device))

    def stage(self, name: str, loss: nn.Module, progress: RunProgress, display: ProgressDisplay) -> None:
        """Held-out perplexity at one of the run's stages: source, after_pruning or final."""
        value = progress.perplexity[name] = self.held_out_perplexity(loss)
        found, said = {f"perplexity_{name}": value}, f"{value:.2f}"
        if self._prunes_vocabulary:
            bits = progress.bits_per_byte[name] = found[f"bits_per_byte_{name}"] = self.bits_per_byte(value)
            said += f" ({bits:.3f} bits per byte)"
        self.metrics.write({"step": progress.step, "tokens": progress.tokens, **found})
        display.say(f"held-out perplexity, {name.replace('_', ' ')}: {said}")

    def held_out_loss_if_due(self, loss: nn.Module, progress: RunProgress) -> None:
        """Along the run, every --eval-every steps; its end is measured anyway."""
        every, step, tokens = self.plan.config.run.eval_every, progress.step, progress.tokens
        if every and step % every == 0 and tokens < self.plan.config.optimizer.tokens:
            value = math.log(self.held_out_perplexity(loss))
            self.metrics.write({"step": step, "tokens": tokens, "held_out_loss": value})

    def quality(self, name: str, model: Any, progress: RunProgress, display: ProgressDisplay) -> None:
        """Quality of the source, or of the final model; said and left out where its context is too short for it.

        To be called after `stage`: its forward pass leaves FSDP's root weights whole, which the model needs here.
        """
        if not self.plan.config.run.quality or name in progress.quality:
            return
        try:
            progress.quality[name] = self._quality(model, name, display).to_dict()
        except DataError as error:
            display.say(f"quality is not measured: {error}")
            return
        measured = {stage: Quality.from_dict(values) for stage, values in progress.quality.items()}
        if name == "final" and "source" in measured:
            display.say(f"of the source's quality: {one_line(contract(measured[name], measured['source'], 'source'))}")

    def _quality(self, model: Any, name: str, display: ProgressDisplay) -> Quality:
        hardware, was_training = self.plan.compute.hardware, model.training
        is_bfloat16 = hardware.dtype == torch.bfloat16
        scored = TorchModel(model, self.tokenizer, hardware.device, is_bfloat16, QUALITY_BATCH_TOKENS)
        hook = model.register_forward_pre_hook(lambda *_: self.stop_signal.check_alone())
        try:
            with torch.compiler.set_stance("force_eager"):  # every length would be compiled
                return measure_quality(
                    scored, lambda what, done, total: display.update(f"{what} of the {name} model", done, total)
                )
        finally:
            hook.remove()
            model.train(was_training)
