"""Sample continuations of several prompts in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

TOKENS_PER_CALL = 16
"""Tokens of a call of `generate`. Finished rows leave the batch after it, which speeds up the others."""


@dataclass(frozen=True)
class RowSampling:
    """Sampling temperature and cut of a row."""

    temperature: float = 1.0
    min_p: float = 0.0
    """Tokens with less than this share of the likeliest token's probability are never sampled."""


@torch.inference_mode()
def continuations(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    device: torch.device,
    samplings: Sequence[RowSampling] = (),
) -> list[list[int]]:
    """Return the token ids after each prompt, computed on `device`.

    Rows that end early may be filled with the padding token. `samplings` are the settings of each row if rows differ.
    """
    # padded on the left, so that the last tokens of all prompts stand in one column, where generation continues
    width, padded, is_read = max(map(len, prompts)), [], []
    for prompt in prompts:
        missing = width - len(prompt)
        padded.append([settings.pad_token_id] * missing + list(prompt))
        is_read.append([0] * missing + [1] * len(prompt))
    tokens, mask = torch.tensor(padded, device=device), torch.tensor(is_read, device=device)
    ends = torch.tensor(settings.eos_token_id, device=device).flatten()
    found: list[list[int]] = [[] for _ in prompts]
    rows, cache = list(range(len(prompts))), None
    # the last states of several prompts lie apart, and a product with such a tensor copies the head for each prompt
    with model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),)):
        for done in range(0, settings.max_new_tokens, TOKENS_PER_CALL):
            call = copy(settings)
            call.max_new_tokens = min(TOKENS_PER_CALL, settings.max_new_tokens - done)
            call.return_dict_in_generate = True
            processors = [_RowSampler([samplings[row] for row in rows], device)] if samplings else []
            output = model.generate(
                tokens,
                attention_mask=mask,
                cache=cache,
                generation_config=call,
                logits_processor=LogitsProcessorList(processors),
            )
            new = output.sequences[:, tokens.shape[1] :]
            for row, more in zip(rows, new.tolist(), strict=True):
                found[row] += more
            has_ended = torch.isin(new, ends).any(1)
            unfinished = (~has_ended).nonzero()[:, 0]
            if not len(unfinished):
                break
            rows, cache = [rows[index] for index in unfinished.tolist()], output.cache
            longer_mask = torch.cat([mask, torch.ones_like(new)], 1)
            tokens, mask = output.sequences[unfinished], longer_mask[unfinished]
            cache.batch_select_indices(unfinished)
    return found


class _RowSampler(LogitsProcessor):
    def __init__(self, samplings: Sequence[RowSampling], device: torch.device) -> None:
        self.temperatures = torch.tensor([[each.temperature] for each in samplings], device=device)
        self.least = torch.tensor([[each.min_p] for each in samplings], device=device).log()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores / self.temperatures
        return scores.masked_fill(scores < scores.amax(1, keepdim=True) + self.least, -torch.inf)
