from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_architecture, tiny_model
from torch.nn import functional as F

from efficientllm.train import loss
from efficientllm.train.loss import cross_entropy, next_token_loss, perplexity


@pytest.mark.parametrize("tokens", [5, 64, 150])
def test_chunked_cross_entropy_equals_torch(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 64)
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 24, requires_grad=True), torch.randn(90, 24, requires_grad=True)
    targets = torch.randint(0, 90, (tokens,))
    ours = cross_entropy(hidden, weight, targets, torch.float32)
    our_gradients = torch.autograd.grad(3 * ours, (hidden, weight))
    theirs = F.cross_entropy(hidden @ weight.T, targets)
    their_gradients = torch.autograd.grad(3 * theirs, (hidden, weight))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradients, their_gradients)


def test_model_loss_equals_transformers() -> None:
    model = tiny_model(tiny_architecture())
    windows = torch.randint(0, 400, (3, 20))
    torch.testing.assert_close(
        next_token_loss(model, windows, torch.float32), model(windows, labels=windows).loss, atol=1e-6, rtol=1e-5
    )


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    model = tiny_model(tiny_architecture())
    windows = torch.randint(0, 400, (5, 20))
    expected = math.exp(float(model(windows, labels=windows).loss.detach()))
    assert perplexity(model, windows.numpy(), 2, torch.float32) == pytest.approx(expected, rel=1e-5)
    assert not model.training
