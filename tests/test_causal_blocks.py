"""Attention in blocks computes the same as torch's attention, forwards and backwards, and about as exactly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import UNEQUAL, tiny_architecture, tiny_model
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from efficientllm.train.compute.causal_blocks import BLOCK, CAUSAL_BLOCKS, causal_blocks, choose_attention
from efficientllm.train.compute.loss import frozen_copy
from efficientllm.train.model.architecture import FAMILIES

LENGTHS = (2, BLOCK - 1, BLOCK, 2 * BLOCK + 9)
CPU = torch.device("cpu")


def results(attend: Any, length: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of queries, keys and values in fp64, for inputs that are the same for every `dtype`."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, heads, length, 16) for heads in (6, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator).bfloat16().to(dtype).requires_grad_() for shape in shapes]
    given = torch.randn((2, length, 6, 16), generator=generator).bfloat16().to(dtype)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=6 // kv_heads)
    output, _ = attend(module, *inputs, None, scaling=0.25)
    return [each.double() for each in (output, *torch.autograd.grad(output, inputs, given))]


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_equal_the_attention_of_torch(length: int, kv_heads: int) -> None:
    ours = results(causal_blocks, length, kv_heads, torch.float64)
    theirs = results(sdpa_attention_forward, length, kv_heads, torch.float64)
    # of_k and of_v are summed in fp32
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[:2], theirs[:2], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_in_bf16_are_about_as_exact_as_torch(length: int) -> None:
    exact = results(sdpa_attention_forward, length, 2, torch.float64)
    ours, theirs = (results(attend, length, 2, torch.bfloat16) for attend in (causal_blocks, sdpa_attention_forward))
    for wanted, found, reference in zip(exact, ours, theirs, strict=True):
        # torch keeps scores and probabilities in fp32, which are rounded to bf16 here
        assert (found - wanted).norm() < 3 * (reference - wanted).norm() + 1e-4 * wanted.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_attends_in_blocks(family: str) -> None:
    """Also beside windows, which are left to torch."""
    model = tiny_model(tiny_architecture(family, UNEQUAL)).eval()
    tokens = torch.randint(0, 400, (2, BLOCK + 20), generator=torch.Generator().manual_seed(1))
    found = []
    for attention in ("sdpa", CAUSAL_BLOCKS):
        model.set_attn_implementation(attention)
        loss = model(tokens, labels=tokens, use_cache=False).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, model.parameters())])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)


def test_blocks_leave_cached_tokens_to_torch() -> None:
    model = tiny_model(tiny_architecture()).eval()
    tokens = torch.randint(0, 400, (1, 9), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **settings)
    model.set_attn_implementation(CAUSAL_BLOCKS)
    assert torch.equal(model.generate(tokens, **settings), expected)


@pytest.mark.parametrize(
    ("name", "expected"), [("AMD EPYC", CAUSAL_BLOCKS), ("Intel(R) Xeon(R)", "sdpa"), (None, "sdpa")]
)
def test_only_cpus_of_amd_attend_in_blocks(name: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {} if name is None else {"cpu_name": name})
    model = tiny_model(tiny_architecture())
    teacher = frozen_copy(model, torch.float32, CPU)
    choose_attention(model, CPU)
    for each in (model, teacher):
        found = {layer.self_attn.config._attn_implementation for layer in each.model.layers}
        assert found == {each.config._attn_implementation} == {expected}
    choose_attention(model, torch.device("meta"))
    assert model.config._attn_implementation == expected
