"""Measurements of a run's model: held-out perplexity on the way, and the quality of the source and the final model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ...runtime.base.errors import DataError
from ...runtime.base.progress import ProgressDisplay
from ...runtime.base.quantities import format_count
from ...runtime.engines.contract_text import one_line
from ..compute.distributed import Parallel
from ..compute.loss import perplexity
from ..compute.stop_signal import StopSignal
from ..compute.trained_model import TrainedModel
from ..evaluation.quality.contract import Quality, contract, measure_quality
from ..evaluation.scoring import Score, ScoreRequest
from ..evaluation.torch_model import TorchModel
from ..reporting.metrics import MetricsWriter, RunProgress
from ..vocabulary.retokenization import ByteTokenizer
from .run_text import RunText

EVALUATION_BATCH_TOKENS = 2048
"""Tokens per forward pass."""


class SharedModel(TorchModel):
    """A model of which every rank has a copy. Each computes a share of scores and answers (collective calls)."""

    def __init__(self, parallel: Parallel, *arguments: Any) -> None:
        """Take the arguments of a TorchModel."""
        super().__init__(*arguments)
        self.parallel = parallel

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        rank, num_ranks = self.parallel.rank, self.parallel.world_size
        for other, scores in enumerate(self.parallel.gather(list(super().score(requests[rank::num_ranks])))):
            yield from ((other + index * num_ranks, score) for index, score in scores)

    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[str]:
        rank, num_ranks = self.parallel.rank, self.parallel.world_size
        answers = [""] * len(prompts)
        for other, own in enumerate(self.parallel.gather(list(super().answer(prompts[rank::num_ranks], max_tokens)))):
            answers[other::num_ranks] = own
        yield from answers


@contextlib.contextmanager
def evaluated(trained: TrainedModel, text: RunText, check: Callable[[], None]) -> Iterator[TorchModel]:
    """Yield the model of a run for evaluations. `check` is called before every forward pass and may raise."""
    model, parallel, is_bfloat16 = trained.model, trained.parallel, trained.loss.dtype == torch.bfloat16
    arguments = model, text.tokenizer, parallel.device, is_bfloat16, EVALUATION_BATCH_TOKENS
    was_training = model.training
    try:
        # otherwise every length would be compiled
        with torch.compiler.set_stance("force_eager"), model.register_forward_pre_hook(lambda *_: check()):
            # ranks that share weights need each other in every forward pass, so they all compute the same
            yield SharedModel(parallel, *arguments) if parallel.mode == "ddp" else TorchModel(*arguments)
    finally:
        model.train(was_training)


class Measuring:
    """The measurements of one run. All but `is_sound` raise StopRequested on a signal."""

    def __init__(
        self,
        trained: TrainedModel,
        text: RunText,
        progress: RunProgress,
        metrics: MetricsWriter,
        display: ProgressDisplay,
        stop_signal: StopSignal,
        batch_size: int,
        prunes_vocabulary: bool,
    ) -> None:
        """Write values to `progress` and `metrics`, and show them in `display`."""
        self.trained, self.text, self.progress, self.metrics = trained, text, progress, metrics
        self.display, self.stop_signal, self.batch_size = display, stop_signal, batch_size
        self.prunes_vocabulary = prunes_vocabulary

    def stage(self, name: str) -> None:
        """Measure held-out perplexity at a stage of the run: source, after_pruning or final."""
        if name == "source":
            num_tokens = self.text.held_out[:, 1:].size
            self.display.say(f"measuring perplexity on {format_count(num_tokens)} held-out tokens")
        value = self.progress.perplexity[name] = self._held_out_perplexity()
        record, shown = {f"perplexity_{name}": value}, f"{value:.2f}"
        if self.prunes_vocabulary:
            bits = self.progress.bits_per_byte[name] = record[f"bits_per_byte_{name}"] = self._bits_per_byte(value)
            shown += f" ({bits:.3f} bits per byte)"
        self._write(record)
        self.display.say(f"held-out perplexity, {name.replace('_', ' ')}: {shown}")

    def held_out_loss(self) -> None:
        """Measure the held-out loss between stages."""
        self._write({"held_out_loss": math.log(self._held_out_perplexity())})

    def _write(self, record: dict[str, float]) -> None:
        self.metrics.write({"step": self.progress.step, "tokens": self.progress.tokens, **record})

    def _held_out_perplexity(self) -> float:
        parallel, check, held_out = self.trained.parallel, self.stop_signal.check, self.text.held_out
        return perplexity(self.trained.wrapped_loss, held_out, self.batch_size, parallel.device, check, parallel)

    def _bits_per_byte(self, perplexity: float) -> float:
        """Return the bits per byte of the held-out text. Unlike perplexity, it is comparable between vocabularies."""
        tokens = self.text.held_out[:, 1:]
        predicted, byte_tokenizer = tokens[tokens >= 0], ByteTokenizer(self.text.tokenizer)
        num_bytes = sum(len(byte_tokenizer.bytes.get(int(token), b"")) for token in predicted)
        return math.log2(perplexity) * predicted.size / max(1, num_bytes)

    def is_sound(self) -> bool:
        """Tell whether the current weights give a finite loss. A checkpoint of other weights would only fail again."""
        held_out = self.text.held_out
        rows = held_out[(held_out[:, 1:] >= 0).any(1)][: self.batch_size]
        return math.isfinite(perplexity(self.trained.wrapped_loss, rows, len(rows), self.trained.parallel.device))

    def quality(self, name: str) -> None:
        """Measure the quality of the source or the final model, unless its context is too short for it.

        Call it after `stage`, whose forward pass leaves FSDP's root weights whole, as the model needs them here.
        """
        if name in self.progress.quality:
            return
        try:
            self.progress.quality[name] = asdict(self._quality(name))
        except DataError as error:
            self.display.say(f"quality is not measured: {error}")
            return
        measured = {stage: Quality(**values) for stage, values in self.progress.quality.items()}
        if name == "final" and "source" in measured:
            kept = contract(measured[name], measured["source"], "source")
            self.display.say(f"of the source's quality: {one_line(kept)}")

    def _quality(self, name: str) -> Quality:
        def report(task: str, done: int, total: int) -> None:
            self.display.update(f"{task} of the {name} model", done, total)

        with evaluated(self.trained, self.text, self.stop_signal.check_alone) as model:
            return measure_quality(model, report)
