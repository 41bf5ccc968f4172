"""Gradients of a step over microbatches and ranks: the mean over all tokens that are learned, whoever saw them."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_architecture, tiny_model, tiny_tokenizer
from torch import Tensor, multiprocessing

from efficientllm.runtime.base.errors import DataError
from efficientllm.train.checkpoint.run_folder import damage
from efficientllm.train.checkpoint.state import TrainingState, save_training_state
from efficientllm.train.compute.distributed import Parallel, single_rank
from efficientllm.train.compute.loss import LossWeights, TrainingLoss, frozen_copy, perplexity
from efficientllm.train.compute.optimizer import make_optimizer
from efficientllm.train.evaluation.scoring import ScoreRequest
from efficientllm.train.evaluation.torch_model import TorchModel
from efficientllm.train.loop.measuring import evaluated
from efficientllm.train.loop.training_step import TrainingStep, accumulate_gradients
from efficientllm.train.pruning.plan import make_tracker
from efficientllm.train.pruning.running_scores import RunningScores
from efficientllm.train.reporting.metrics import RunProgress

CPU = torch.device("cpu")
KINDS = ("kv_group", "ffn")


def unequal_windows() -> Tensor:
    """[4, 17]: a third of the tokens of the first two windows are learned, one of the third's, all of the last's."""
    windows = torch.randint(0, 400, (4, 17), generator=torch.Generator().manual_seed(2))
    is_read = torch.zeros_like(windows, dtype=torch.bool)
    is_read[:2, ::3] = is_read[:2, 1::3] = True
    is_read[2, 2:] = True
    return torch.where(is_read, ~windows, windows)


class Scores:
    """As much of a Pruner as gradients are shown to."""

    def __init__(self, tracker: RunningScores) -> None:
        self.tracker = tracker

    @property
    def needs_microbatches(self) -> bool:
        return self.tracker.needs_microbatches

    def observe_gradients(self, model: Any, sample_weight: float = 1.0) -> None:
        self.tracker.accumulate(model.named_parameters(), sample_weight)


def gradients(
    microbatches: list[Tensor],
    mode: str = "ddp",
    distill: float = 0.0,
    tracker: RunningScores | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, dict[str, Tensor]]:
    """(cross-entropy over all ranks, {parameter: gradient}) of one step of a tiny model.

    A mode "fsdp once" averages gradients after the last microbatch only.
    """
    model = tiny_model(tiny_architecture()).train()
    for parameter in model.parameters() if dtype == torch.bfloat16 else ():
        if parameter.dim() == 1:  # FSDP sends gains of norms in bf16
            parameter.data = parameter.data.to(dtype).float()
    teacher = frozen_copy(tiny_model(tiny_architecture(), seed=1), dtype, CPU) if distill else None
    loss = TrainingLoss(model, dtype, LossWeights(0.5, distill), teacher)
    mode, _, once = mode.partition(" ")
    parallel = Parallel(mode, CPU, reduces_once=bool(once))
    scores, unreduced = None, []
    if tracker is not None:
        tracker.attach(model)
        scores = Scores(tracker)

    def check() -> None:
        unreduced.append(all(parameter.grad is None for parameter in model.parameters()))

    wrapped = parallel.wrap(loss)
    found = accumulate_gradients(wrapped, model, microbatches, scores, parallel, check)  # type: ignore[arg-type]
    if once:
        assert all(unreduced)
    if tracker is not None:
        tracker.finish_step()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in named.items()}
    return parallel.mean(found), whole


@pytest.mark.parametrize("distill", [0.0, 0.7])
@pytest.mark.parametrize("criterion", [None, "taylor1", "taylor2", "fisher"])
def test_unequal_microbatches_give_the_gradient_of_one_batch(distill: float, criterion: str | None) -> None:
    """Criteria that see every microbatch alone must leave the same gradient."""
    windows, tracker = unequal_windows(), None
    if criterion is not None:
        tracker = make_tracker(criterion, KINDS, tiny_architecture(), 0.5)
    loss, found = gradients(list(windows.split(1)), distill=distill, tracker=tracker)
    expected_loss, expected = gradients([windows], distill=distill)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_microbatch_without_learned_tokens_counts_nothing() -> None:
    windows = unequal_windows()
    only_read = torch.where(windows < 0, windows, ~windows)
    loss, found = gradients([windows, only_read])
    expected_loss, expected = gradients([windows])
    assert loss == expected_loss
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient)
    nothing = gradients([only_read])
    assert nothing[0] == 0
    assert not any(gradient.any() for gradient in nothing[1].values())


@pytest.mark.parametrize("name", ["taylor1", "token-fisher"])
def test_scores_of_unequal_microbatches_equal_those_of_one_batch(name: str) -> None:
    """Both are sums over tokens of a step."""

    def scores(microbatches: list[Tensor]) -> dict[str, list[Tensor]]:
        tracker = make_tracker(name, KINDS, tiny_architecture(), 0.5)
        gradients(microbatches, tracker=tracker)
        return tracker.scores

    windows = unequal_windows()
    found, expected = scores(list(windows.split(1))), scores([windows])
    for kind in KINDS:
        for one, other in zip(found[kind], expected[kind], strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-4)


def test_samples_of_taylor2_count_by_their_learned_tokens() -> None:
    """Its first-order part is that of the step's loss; Fisher's terms are expectations over tokens' microbatches."""
    windows = unequal_windows()
    counts = (windows[:, 1:] >= 0).sum(1).double()
    shares = counts / counts.sum()
    tracker = make_tracker("taylor2", ("ffn",), tiny_architecture(), 0.5)
    gradients(list(windows.split(1)), tracker=tracker)
    model, first, second = tiny_model(tiny_architecture()), torch.zeros(()), torch.zeros(())
    for row, share in zip(windows.split(1), shares.tolist(), strict=True):
        _, found = gradients([row])
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.1.mlp.{part}.weight"
            term = found[name] * model.get_parameter(name).detach()
            dim = 0 if part == "down_proj" else 1
            first, second = first + share * term.sum(dim), second + share * term.square().sum(dim)
    torch.testing.assert_close(tracker.scores["ffn"][1], (first - 0.5 * second).abs(), atol=1e-9, rtol=1e-4)


def _join(rank: int, mode: str, port: int) -> Parallel:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    return Parallel(mode, CPU)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _agree(rank: int, parallel: Parallel, folder: Path) -> None:
    """Errors, measurements and checkpoints of ranks are shared."""

    def fail(failing: int, error: Exception) -> None:
        if rank == failing:
            raise error

    for failing, error in ((0, DataError("bad line")), (1, DataError("bad line")), (1, OSError("I/O error"))):
        with pytest.raises(DataError, match=f"^rank 1: {error}" if failing > rank else str(error)):
            parallel.together(functools.partial(fail, failing, error))
    assert parallel.together(lambda: rank + 7, only_main=True) == 7
    assert parallel.together(lambda: rank) == rank
    model = tiny_model(tiny_architecture())
    loss, windows = TrainingLoss(model, torch.float32), unequal_windows().numpy()[:3]
    shared = perplexity(parallel.wrap(loss), windows, 1, CPU, parallel=parallel)  # three batches for two ranks
    assert shared == pytest.approx(perplexity(loss, windows, 1, CPU), rel=1e-6)
    _share_evaluation(rank, model, parallel)
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.95), 0.01)
    save_training_state(folder, model, optimizer, TrainingState(RunProgress(), {}), 1, parallel)
    assert damage(folder) == ""


def _share_evaluation(rank: int, model: Any, parallel: Parallel) -> None:
    """Scores and answers are those of one process, and a rank computes its share."""
    text, trained = SimpleNamespace(tokenizer=tiny_tokenizer()), SimpleNamespace(parallel=parallel)
    trained.model, trained.loss = model, SimpleNamespace(dtype=torch.float32)
    requests = [ScoreRequest(tuple(range(5, 9 + length)), 1 + length % 2) for length in range(5)]
    prompts = [[5, 6, 7], [9, 10], [11]]
    alone = TorchModel(model, text.tokenizer, CPU, False, batch_tokens=1)
    expected, answers = dict(alone.score(requests)), list(alone.answer(prompts, 4))
    passes: list[None] = []
    with evaluated(trained, text, lambda: passes.append(None)) as shared:  # type: ignore[arg-type]
        shared.batch_tokens = 1
        found = dict(shared.score(requests))
        assert len(passes) == (3, 2)[rank]
        assert list(shared.answer(prompts, 4)) == answers
    assert found.keys() == expected.keys()
    for index, score in found.items():
        assert score.log_probs == pytest.approx(expected[index].log_probs, rel=1e-6)
        assert (score.is_greedy == expected[index].is_greedy).all()


RANKED = [
    ("ddp", "taylor1", torch.float32),
    ("ddp", "fisher", torch.float32),
    ("fsdp", "taylor2", torch.float32),
    ("fsdp", "taylor1", torch.bfloat16),
    ("fsdp once", "taylor1", torch.float32),
    ("fsdp once", "taylor1", torch.bfloat16),
]
"""Mode, criterion and type of products of two ranks."""


def _tracked(
    microbatches: list[Tensor], mode: str, criterion: str, dtype: torch.dtype, parallel: Parallel | None = None
) -> tuple[float, dict[str, Tensor], dict[str, list[Tensor]]]:
    """(cross-entropy, {parameter: gradient}, scores) of one step."""
    mean = parallel.mean_tensors if parallel is not None else single_rank
    tracker = make_tracker(criterion, KINDS, tiny_architecture(), 0.5, mean_over_ranks=mean)
    return *gradients(microbatches, mode, 0.7, tracker, dtype), tracker.scores


def _rank(rank: int, port: int, folder: Path) -> None:
    parallel = _join(rank, "ddp", port)
    _agree(rank, parallel, folder / "checkpoints" / "step-00000001")
    mine = list(parallel.own_rows(unequal_windows()).split(1))
    for number, case in enumerate(RANKED):
        found = _tracked(mine, *case, parallel)
        if rank == 0:
            torch.save(found, folder / f"{number}.pt")
    parallel.barrier()
    parallel.close()


@pytest.mark.slow
def test_two_ranks_agree_and_with_unequal_tokens_are_one_process(tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, (_free_port(), tmp_path), nprocs=2)  # type: ignore[attr-defined]
    for number, (mode, criterion, dtype) in enumerate(RANKED):
        rows = 1 if dtype == torch.bfloat16 else 4  # products of other rows are rounded otherwise
        expected_loss, expected, of_one = _tracked(list(unequal_windows().split(rows)), "ddp", criterion, dtype)
        loss, found, scores = torch.load(tmp_path / f"{number}.pt")
        assert loss == pytest.approx(expected_loss, rel=1e-6), (mode, criterion, dtype)
        for name, gradient in expected.items():
            is_rounded = mode != "ddp" and dtype == torch.bfloat16 and gradient.dim() == 1  # the gain of a norm
            atol = 2**-7 * float(gradient.abs().max()) if is_rounded else 1e-6
            torch.testing.assert_close(found[name], gradient, atol=atol, rtol=1e-4)
        if criterion == "taylor1":  # the others depend on which windows are one sample
            for kind, of_layers in of_one.items():
                for score, alone in zip(scores[kind], of_layers, strict=True):  # a small sum has its terms' rounding
                    torch.testing.assert_close(score, alone, atol=1e-6 * float(alone.max()), rtol=1e-4)


def test_the_use_of_a_gpu_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    step: Any = TrainingStep.__new__(TrainingStep)
    step.tokens, step.parallel = 1000, SimpleNamespace(device=torch.device("cuda:0"), world_size=2)
    step.trained = SimpleNamespace(loss=SimpleNamespace(teacher=None))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    figures = {"tokens_per_second": 2000.0, "memory_bytes": 7, "mfu": round(6e9 * 2000 / (2 * 989e12), 4)}
    assert step.speed(0.5, 10**9) == figures
