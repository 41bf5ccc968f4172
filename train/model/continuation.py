"""What a model says after several prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig


@torch.inference_mode()
def continuations(
    model: Any, prompts: Sequence[Sequence[int]], settings: GenerationConfig, device: torch.device
) -> list[list[int]]:
    """Token ids after each prompt, computed on `device`; what ends before others is filled with the padding token."""
    width, pad = max(map(len, prompts)), settings.pad_token_id
    inputs = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    found = model.generate(
        torch.tensor(inputs, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=settings,
    )
    return found[:, width:].tolist()
