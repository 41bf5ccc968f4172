from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_architecture, tiny_model
from torch.nn import functional as F

from efficientllm.train.compute import loss
from efficientllm.train.compute.loss import (
    LossWeights,
    Reference,
    TrainingLoss,
    cross_entropy,
    frozen_copy,
    perplexity,
)


@pytest.mark.parametrize("tokens", [5, 64, 150])
@pytest.mark.parametrize("distill", [0.0, 0.7])
def test_chunked_loss_equals_torch(tokens: int, distill: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 64)
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 24, requires_grad=True), torch.randn(90, 24, requires_grad=True)
    teacher = Reference(torch.randn(tokens, 30), torch.randn(90, 30)) if distill else None
    targets = torch.randint(0, 90, (tokens,))
    ours, our_cross_entropy = cross_entropy(
        hidden, weight, targets, torch.float32, LossWeights(distill=distill), teacher
    )
    our_gradients = torch.autograd.grad(3 * ours, (hidden, weight))
    logits = hidden @ weight.T
    their_cross_entropy = F.cross_entropy(logits, targets)
    theirs = their_cross_entropy
    if teacher is not None:
        reference = F.log_softmax(teacher.hidden @ teacher.weight.T, -1)
        theirs = theirs + distill * F.kl_div(
            F.log_softmax(logits, -1), reference, log_target=True, reduction="batchmean"
        )
    their_gradients = torch.autograd.grad(3 * theirs, (hidden, weight))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_cross_entropy, their_cross_entropy.detach())
    torch.testing.assert_close(our_gradients, their_gradients)


def test_model_loss_equals_transformers() -> None:
    model = tiny_model(tiny_architecture())
    windows = torch.randint(0, 400, (3, 20))
    total, entropy = TrainingLoss(model, torch.float32)(windows)
    expected = model(windows, labels=windows).loss
    torch.testing.assert_close(total, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(entropy, expected.detach(), atol=1e-6, rtol=1e-5)


def test_distilling_into_the_teacher_itself_changes_nothing() -> None:
    model = tiny_model(tiny_architecture())
    windows = torch.randint(0, 400, (3, 20))
    teacher = frozen_copy(model, torch.float32, torch.device("cpu"))
    total, entropy = TrainingLoss(model, torch.float32, LossWeights(distill=2.0), teacher)(windows)
    torch.testing.assert_close(total.detach(), entropy)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    names = [
        name for name, _ in TrainingLoss(model, torch.float32, LossWeights(distill=2.0), teacher).named_parameters()
    ]
    assert len(names) == len(list(model.named_parameters()))


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    model = tiny_model(tiny_architecture())
    windows = torch.randint(0, 400, (5, 20))
    expected = math.exp(float(model(windows, labels=windows).loss.detach()))
    measured = perplexity(TrainingLoss(model, torch.float32).eval(), windows.numpy(), 2, torch.device("cpu"))
    assert measured == pytest.approx(expected, rel=1e-5)
    assert not model.training
