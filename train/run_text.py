"""The text of a run in the model's tokens: what it trains on, is measured on and is fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from .compute.loss import TrainingLoss
from .data.chat import Encoder
from .data.packing import PackedStream
from .plan import RunPlan, windows_apart
from .pruning.rows import RowProbe
from .stop_signal import StopSignal
from .vocabulary.frequency import count_tokens, expected_splits
from .vocabulary.retokenization import TokenAligner
from .vocabulary.tokenizer_pruning import prune_tokenizer


class RunText:
    """The stream of a run, and text drawn apart from it."""

    def __init__(self, plan: RunPlan, stream: PackedStream) -> None:
        self.plan, self.stream = plan, stream
        self.tokenizer = plan.tokenizer
        """The model's: the source's without the tokens that are gone."""

    @cached_property
    def block_windows(self) -> np.ndarray:
        """Windows [n, S + 1], the same for every measurement of blocks and rows."""
        return self._apart(self.plan.config.pruning.block_tokens)

    @cached_property
    def recovery_windows(self) -> np.ndarray:
        """Windows [n, S + 1], the same for every fit."""
        return self._apart(self.plan.config.pruning.recover_tokens)

    def _apart(self, tokens: int) -> np.ndarray:
        plan = self.plan
        return windows_apart(plan.config, plan.data, self.tokenizer, plan.compute.parallel.world_size, tokens)

    def row_probe(self, loss: TrainingLoss, stop_signal: StopSignal) -> RowProbe:
        """Measures vocabulary rows of the model as it is, by how often the run's text has their tokens."""
        plan, settings = self.plan, self.plan.config.pruning
        assert plan.pruning is not None
        pieces, fraction = plan.pruning.pieces, plan.config.source.held_out_fraction
        assert pieces is not None
        encoder, tokens = Encoder(plan.tokenizer), settings.vocabulary_tokens
        counts = count_tokens(plan.data, encoder, fraction, pieces.size, tokens, stop_signal.check_alone)
        splits = expected_splits(pieces, counts, settings.vocabulary_prior)
        windows, parallel = self.block_windows, plan.compute.parallel
        return RowProbe(loss, plan.tokenizer, splits, windows, parallel, stop_signal.check)

    def go_on_without_rows(self, kept: Sequence[int], loss: TrainingLoss) -> None:
        """Read on with the tokens that stay, the source's `kept`; the teacher of `loss` goes on reading its own."""
        source = self.plan.tokenizer
        self.tokenizer = prune_tokenizer(source, kept)
        self.stream.switch_tokenizer(self.tokenizer)
        for name in ("block_windows", "recovery_windows"):
            self.__dict__.pop(name, None)  # made anew from the same text
        if self.plan.config.optimizer.distill:
            loss.source_text = TokenAligner(self.tokenizer, source, kept, self.plan.architecture.vocab_size)
