"""Several prompts continued at once: rows that have ended leave the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_architecture, tiny_model
from transformers import GenerationConfig

from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.continuation import TOKENS_PER_CALL, continuations

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15], [3, 250, 17, 8], [77, 301]]
LENGTH = 3 * TOKENS_PER_CALL + 5


def greedy(ends: list[int]) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=LENGTH, do_sample=False, eos_token_id=ends, pad_token_id=0)


def alone(model: Any, prompt: list[int]) -> list[int]:
    """Token by token, without a cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(LENGTH):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_each_row_equals_the_continuation_of_its_prompt_alone(family: str) -> None:
    """Up to its end; the first layer has no attention, and windows slide in one of the families."""
    layers = (LayerShape(0, 0, 96), LayerShape(4, 2, 128), LayerShape(2, 1, 64))
    model: Any = tiny_model(tiny_architecture(family, layers)).eval()
    expected = [alone(model, prompt) for prompt in PROMPTS]
    ends = [expected[0][2], expected[2][TOKENS_PER_CALL + 1]]  # some rows end in the first call, some later or never
    found = continuations(model, PROMPTS, greedy(ends), torch.device("cpu"))
    lengths = []
    for row, whole in zip(found, expected, strict=True):
        length = next((index + 1 for index, token in enumerate(whole) if token in ends), LENGTH)
        assert row[:length] == whole[:length]
        lengths.append(length)
    assert min(lengths) <= TOKENS_PER_CALL


def test_continuation_stops_at_the_last_end() -> None:
    model: Any = tiny_model(tiny_architecture()).eval()
    first = continuations(model, PROMPTS[:1], greedy([399]), torch.device("cpu"))[0]
    assert len(first) == LENGTH
    (row,) = continuations(model, PROMPTS[:1], greedy([first[1]]), torch.device("cpu"))
    assert row[: first.index(first[1]) + 1] == first[: first.index(first[1]) + 1]
    assert len(row) <= TOKENS_PER_CALL
