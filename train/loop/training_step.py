"""One optimizer step: gradients over microbatches and ranks, saliency from the same gradients, and the update."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...runtime.base.errors import DataError
from ..compute.distributed import Parallel, without_sync
from ..compute.hardware import peak_flops
from ..compute.loss import LossWeights, SourceText, count_predicted, source_texts, to_device
from ..compute.optimizer import clip_factor, gradient_norm
from ..compute.stop_signal import StopRequested, StopSignal
from ..compute.trained_model import TrainedModel
from ..config.sections import OptimizerConfig
from ..data.packing import PackedStream
from ..pruning.pruner import Pruner
from ..reporting.metrics import RunProgress

_log = logging.getLogger("efficientllm.train")


class TrainingStep:
    """The optimizer steps of a run."""

    def __init__(
        self,
        trained: TrainedModel,
        stream: PackedStream,
        progress: RunProgress,
        settings: OptimizerConfig,
        pruner: Pruner | None,
        stop_signal: StopSignal,
    ) -> None:
        """Train on windows of `stream` and advance `progress`."""
        self.trained, self.stream, self.progress, self.settings = trained, stream, progress, settings
        self.pruner, self.stop_signal, self.parallel = pruner, stop_signal, trained.parallel
        self.tokens = settings.batch_size * settings.gradient_accumulation * self.parallel.world_size
        self.tokens *= stream.sequence_length
        """Tokens of all ranks in a step."""
        self._has_warned = False

    def run(self, rounded_weights: contextlib.AbstractContextManager[None]) -> tuple[dict[str, Any], bool]:
        """Take one step and return (its log record, whether it changed the weights).

        Gradients are computed within `rounded_weights`. A stop signal or unreadable text raises before the weights
        change. Then everything is as before the step.
        """
        undo, progress = self._undo(), self.progress
        try:
            start = time.monotonic()
            microbatches = self.parallel.together(self._next_microbatches)
            data_seconds = time.monotonic() - start
            # in every step, because they change when pruning is done
            self.trained.loss.weights = self._loss_weights()
            with rounded_weights:
                own_loss = self._accumulate_gradients(microbatches)
        except (StopRequested, DataError):
            undo()
            raise
        loss = self.parallel.mean(own_loss)
        grad_norm = gradient_norm(self.trained.model.parameters())
        record: dict[str, Any] = {"step": progress.step + 1, "loss": loss, "grad_norm": float(grad_norm)}
        is_usable = False
        if not (math.isfinite(loss) and math.isfinite(record["grad_norm"])):
            record["skipped"] = True
            progress.skipped_in_a_row += 1
        elif not self.parallel.any(any(map(count_predicted, microbatches))):
            # its gradient is 0, but AdamW would still move the weights by their moments and the decay
            self._skip_untargeted_step(record)
        else:
            is_usable = True
            self._update_weights(grad_norm)
        if not is_usable and self.pruner is not None:
            self.pruner.discard_step()
        self.trained.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += self.tokens
        record |= {"tokens": progress.tokens, "learning_rate": self.trained.optimizer.param_groups[0]["lr"]}
        record["data_seconds"] = round(data_seconds, 4)
        return record, is_usable

    def speed(self, seconds: float, num_parameters: int) -> dict[str, float]:
        """Return log fields of a step of a model with these parameters: its speed, and the use of a GPU.

        `mfu` counts 6 FLOP for a parameter and a token and 2 for a teacher's parameter, without attention. It is a
        share of the bf16 peak. `memory_bytes` is the peak of the main rank since its start.
        """
        device, teacher = self.parallel.device, self.trained.loss.teacher
        figures = {"tokens_per_second": round(self.tokens / max(seconds, 1e-9), 1)}
        if device.type == "cuda":
            figures["memory_bytes"] = torch.cuda.max_memory_allocated(device)
        if peak := peak_flops(device):
            flops = 6 * num_parameters
            if teacher is not None:
                flops += 2 * teacher.num_parameters()
            share = flops * figures["tokens_per_second"] / (peak * self.parallel.world_size)
            figures["mfu"] = round(share, 4)
        return figures

    def _undo(self) -> Callable[[], None]:
        """Return a function that undoes all effects of a step before its update."""
        device = self.parallel.device
        position, cpu_state = self.stream.state(), torch.get_rng_state()
        gpu_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        # only a step of several microbatches can be interrupted after a forward pass has changed the Gram matrices
        is_checked = self.settings.gradient_accumulation > 1
        grams = self.pruner.copy_grams() if self.pruner is not None and is_checked else None

        def undo() -> None:
            """Restore the text's position and the random state, and forget gradients and saliency of the step."""
            self.stream.load_state(position)
            torch.set_rng_state(cpu_state)
            if gpu_state is not None:
                torch.cuda.set_rng_state(gpu_state, device)
            self.trained.optimizer.zero_grad(set_to_none=True)
            if self.pruner is not None:
                self.pruner.discard_step(grams)

        return undo

    def _next_microbatches(self) -> list[Tensor]:
        """Return this rank's windows [B, S + 1] of every microbatch of a step, in host memory."""
        parallel, rows = self.parallel, self.settings.batch_size * self.parallel.world_size
        steps = self.settings.gradient_accumulation
        windows = np.split(self.stream.next_windows(steps * rows), steps)
        own = [torch.from_numpy(parallel.own_rows(each)) for each in windows]
        # pinned memory is copied to a GPU while the host continues
        return [each.pin_memory() for each in own] if parallel.device.type == "cuda" else own

    def _loss_weights(self) -> LossWeights:
        """Return the configured weights, with at least the whole cross-entropy while gradients rank groups."""
        cross_entropy, distill = self.settings.cross_entropy, self.settings.distill
        # the gradient of distillation is zero at the source, and its rounding errors rank nothing
        if self.pruner is not None and self.pruner.ranks_by_gradients and not self.pruner.is_done:
            cross_entropy = max(1.0, cross_entropy)
        return LossWeights(cross_entropy, distill)

    def _accumulate_gradients(self, microbatches: Sequence[Tensor]) -> float:
        """Compute the gradients of windows [B, S + 1] and return this rank's loss."""
        trained, parallel, check = self.trained, self.parallel, self.stop_signal.check
        texts = source_texts(trained.loss, microbatches, parallel.device)
        with contextlib.closing(texts):
            return accumulate_gradients(
                trained.wrapped_loss, trained.model, microbatches, self.pruner, parallel, check, texts
            )

    def _update_weights(self, grad_norm: Tensor) -> None:
        if self.pruner is not None:  # only now: a step that is skipped must leave no saliency
            self.pruner.finish_step()
        for group in self.trained.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.progress.tokens + self.tokens)
        self.trained.optimizer.step(gradient_scale=clip_factor(grad_norm, self.settings.max_grad_norm))
        self.progress.skipped_in_a_row = 0

    def _skip_untargeted_step(self, record: dict[str, Any]) -> None:
        """Record that no token of a step's windows is a training target, and warn the first time."""
        record["nothing_to_learn"] = True
        if not self._has_warned:
            _log.warning(
                f"step {record['step']}: its windows contain no tokens to learn; such steps are skipped, and a "
                "longer --sequence-length or larger --batch-size makes them rarer"
            )
        self._has_warned = True


def learning_rate(settings: OptimizerConfig, tokens: int) -> float:
    """Return the learning rate of the step that ends after `tokens`. The first is not zero, the last is the floor.

    It rises linearly over the warm-up. 'wsd' (warmup-stable-decay) then stays at the peak and falls linearly to the
    floor in the last part of the run. 'cosine' follows half a cosine to the floor. 'constant' stays.
    """
    total, peak, floor, shape = settings.tokens, settings.learning_rate, settings.lr_floor, settings.lr_schedule
    warmup = round(settings.lr_warmup * total)
    # `tokens` counts those of the step itself, so that the first step learns
    if tokens < warmup:
        return peak * (tokens / warmup)
    start = round((1 - settings.lr_decay) * total) if shape == "wsd" else warmup
    if shape == "constant" or tokens <= start or total <= start:
        return peak
    progress = min(1.0, (tokens - start) / (total - start))
    if shape == "cosine":
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    return peak * (1.0 - (1.0 - floor) * progress)


def accumulate_gradients(
    wrapped_loss: nn.Module,
    model: Any,
    microbatches: Sequence[Tensor],
    pruner: Pruner | None,
    parallel: Parallel,
    check: Callable[[], None] = lambda: None,
    texts: Iterable[SourceText | None] = itertools.repeat(None),
) -> float:
    """Leave the gradients of the mean loss over all learned tokens of the step in .grad of the parameters.

    The mean covers all microbatches [B, S + 1], in host memory, and ranks. Returns this rank's share of the step's
    cross-entropy; its mean over ranks is the mean over all learned tokens.

    A saliency that is not linear in the gradient (taylor2, fisher) needs every microbatch of every rank alone. Then
    .grad is emptied after each one and DDP averages nothing. The sums are kept aside and averaged at the end. FSDP
    averages gradients in its own backward pass, so a sample is a microbatch of all ranks there.

    `check` is called between microbatches, equally often on every rank, and may raise on all of them. `texts` are the
    microbatches in the teacher's tokens (see `source_texts`).
    """
    steps = len(microbatches)
    needs_samples = pruner is not None and pruner.needs_microbatches
    per_microbatch = needs_samples and (steps > 1 or parallel.world_size > 1)
    tokens = [count_predicted(windows) for windows in microbatches]
    means = parallel.means(tokens)
    step_tokens = sum(means) or 1.0  # a mean over ranks
    tokens_of_samples = means if parallel.mode == "fsdp" else tokens
    accumulated: dict[Tensor, Tensor] = {}
    cross_entropies: list[Tensor] = []
    samples = zip(range(steps), microbatches, tokens, tokens_of_samples, texts, strict=False)
    for place, windows, count, sample_tokens, text in samples:
        if place:
            check()
        # The mean loss of the microbatch becomes its part of the step's mean loss, or of its sample's. A sample's
        # gradient is weighted afterwards, by 1 on average. With equal counts, nothing is rounded.
        whole = sample_tokens if per_microbatch else step_tokens
        divisor = whole / count if count else math.inf
        weight = sample_tokens * steps / step_tokens
        is_last = place == steps - 1
        if parallel.mode == "fsdp":
            stays_local = parallel.reduces_once and not per_microbatch and not is_last
        else:
            stays_local = per_microbatch or not is_last
        with without_sync(wrapped_loss, stays_local):
            loss, cross_entropy = wrapped_loss(*to_device(windows, parallel.device), text=text)
            (loss / divisor).backward()
        cross_entropies.append(cross_entropy.detach())
        if per_microbatch:
            assert pruner is not None
            pruner.observe_gradients(model, weight)
            _move_gradients(model.parameters(), accumulated, weight)
    if per_microbatch:
        for parameter, gradient in accumulated.items():
            parameter.grad = gradient.div_(steps)
        if parallel.mode == "ddp":
            parallel.mean_tensors(accumulated.values())
    elif pruner is not None:
        pruner.observe_gradients(model)
    each_loss = torch.stack(cross_entropies).tolist()  # once, because it waits for the GPU
    total = sum(each * count for each, count in zip(each_loss, tokens, strict=True))
    return total / max(1, sum(tokens)) * (sum(tokens) / step_tokens)


def _move_gradients(parameters: Iterable[Tensor], accumulated: dict[Tensor, Tensor], weight: float) -> None:
    """Add `weight` times .grad of every parameter to `accumulated` and empty it."""
    for parameter in parameters:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            continue
        if weight != 1.0:
            gradient.mul_(weight)
        if parameter in accumulated:
            accumulated[parameter].add_(gradient)
        else:
            accumulated[parameter] = gradient
