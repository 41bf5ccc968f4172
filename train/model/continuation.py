"""What a model says after several prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from transformers import GenerationConfig

STRETCH = 16
"""Tokens between two looks at which rows have ended: they leave the batch, and the others get faster."""


@torch.inference_mode()
def continuations(
    model: Any, prompts: Sequence[Sequence[int]], settings: GenerationConfig, device: torch.device
) -> list[list[int]]:
    """Token ids after each prompt, computed on `device`; what ends early may be filled with the padding token."""
    width, pad = max(map(len, prompts)), settings.pad_token_id
    padded = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    seen = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    tokens, mask = torch.tensor(padded, device=device), torch.tensor(seen, device=device)
    ends = torch.tensor(settings.eos_token_id, device=device).flatten()
    found: list[list[int]] = [[] for _ in prompts]
    rows, cache = list(range(len(prompts))), None
    for done in range(0, settings.max_new_tokens, STRETCH):
        stretch = copy(settings)
        stretch.max_new_tokens = min(STRETCH, settings.max_new_tokens - done)
        stretch.return_dict_in_generate = True
        said = model.generate(tokens, attention_mask=mask, cache=cache, generation_config=stretch)
        new = said.sequences[:, tokens.shape[1] :]
        for row, more in zip(rows, new.tolist(), strict=True):
            found[row] += more
        goes_on = (~torch.isin(new, ends).any(1)).nonzero()[:, 0]
        if not len(goes_on):
            break
        rows, cache = [rows[index] for index in goes_on.tolist()], said.cache
        tokens, mask = said.sequences[goes_on], torch.cat([mask, torch.ones_like(new)], 1)[goes_on]
        cache.batch_select_indices(goes_on)
    return found
