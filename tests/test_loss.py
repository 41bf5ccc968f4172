from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_architecture, tiny_model
from torch.nn import functional as F

from efficientllm.train.compute import loss
from efficientllm.train.compute.loss import LossWeights, Reference, TrainingLoss, cross_entropy, frozen_copy, perplexity


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("teacher", ["none", "same vocabulary", "other vocabulary"])
def test_fused_loss_equals_the_one_of_single_kernels(teacher: str) -> None:
    """GPUs compile it. Here the compiler makes code for the CPU."""
    torch.manual_seed(0)
    logits, targets = torch.randn(12, 90), torch.randint(0, 90, (12,))
    theirs = None if teacher == "none" else torch.randn(12, 100 if teacher == "other vocabulary" else 90)
    first = torch.randint(0, 90, (100,)) if teacher == "other vocabulary" else None
    is_known = torch.arange(12) % 3 > 0 if first is not None else None
    rest = (targets, theirs, first, is_known, (0.7, 1.0), torch.full((), 12))
    ours, expected = logits.clone(), logits.clone()
    found = loss._fused_losses_of_rows()(ours, *rest)
    torch.testing.assert_close(found, loss._losses_of_rows(expected, *rest))
    torch.testing.assert_close(ours, expected)
    assert not torch.equal(ours, logits)


def test_chunks_of_a_gpu_are_larger() -> None:
    assert [loss.chunk_tokens(True, size) for size in (128_256, 49_152, 10**9)] == [2048, 5120, 512]
    assert loss.chunk_tokens(False, 128_256) == loss.CHUNK_TOKENS


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


def test_no_teacher_is_asked_where_nothing_is_learned() -> None:
    model = tiny_model(tiny_architecture())
    teacher = frozen_copy(tiny_model(tiny_architecture(), seed=5), torch.float32, torch.device("cpu"))
    passes: list[int] = []
    teacher.model.register_forward_pre_hook(lambda module, arguments: passes.append(1))
    loss = TrainingLoss(model, torch.float32, LossWeights(1.0, 1.0), teacher)
    windows = torch.randint(0, 400, (3, 20))
    with torch.no_grad():
        trained = loss.train()(windows)
        measured = loss.eval()(windows)
    assert len(passes) == 1
    torch.testing.assert_close(measured[0], measured[1])
    torch.testing.assert_close(measured[1], trained[1])
    assert trained[0] > trained[1]
