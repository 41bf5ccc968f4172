"""Corpora of a run: those of its configuration, and chats sampled from its source."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..runtime.base.progress import ProgressDisplay
from .compute.distributed import Parallel
from .compute.loss import make_teacher
from .config import TrainConfig
from .data.documents import DataSpec
from .data.packing import PackedStream
from .data.self_chat import MAX_TOKENS, MIN_SEQUENCES, SELF_CHAT, self_chat_file

RECOVERY_SEED = 1_000_003
"""Added to the run's seed for text in an order that training does not see."""


def data_specs(config: TrainConfig) -> tuple[DataSpec, ...]:
    """Return the corpora of a run."""
    settings = config.source
    return tuple(DataSpec.parse(text, settings.skip_bad_lines, settings.text_field) for text in settings.data)


def windows_apart(
    config: TrainConfig, data: tuple[DataSpec, ...], tokenizer: PreTrainedTokenizerBase, ranks: int, tokens: int
) -> np.ndarray:
    """Return windows [n, S + 1] of about `tokens` of the training text, in another order than training.

    Their number is a multiple of the ranks. They serve --recover and the measurement of blocks.
    """
    settings = config.source
    seed = config.run.seed + RECOVERY_SEED
    stream = PackedStream(data, tokenizer, settings.sequence_length, settings.held_out_fraction, seed)
    return stream.next_windows(max(1, tokens // settings.sequence_length // ranks) * ranks)


def with_self_chats(
    config: TrainConfig, source: Any, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, parallel: Parallel
) -> tuple[DataSpec, ...]:
    """Return the corpora, with self-chats (sampled in `dtype`) as the file that stores them."""
    specs = data_specs(config)
    shares = [spec.weight for spec in specs if spec.path == SELF_CHAT]
    if not shares:
        return specs
    wanted = round(config.optimizer.tokens * sum(shares) / sum(spec.weight for spec in specs))
    tokens = min(MAX_TOKENS, max(wanted, MIN_SEQUENCES * config.source.sequence_length))
    with ProgressDisplay(silent=not parallel.is_main) as display:
        path = None
        for is_mine in (parallel.is_main, not parallel.is_main):  # the main process samples, the others read it
            if is_mine:
                report = partial(display.update, "sampling the source's chats")
                load_model = partial(make_teacher, source, dtype, parallel.device)
                path = self_chat_file(source, load_model, tokenizer, tokens, config.run.seed, report)
            parallel.barrier()
    return tuple(replace(spec, path=str(path)) if spec.path == SELF_CHAT else spec for spec in specs)
