"""Bytes of training: gradients, moments, removal, checkpoints, the estimate."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import some_removal
from tiny import tiny_architecture, tiny_model
from training import ERRORS, command, expect_equal_weights, metrics, run, run_until

from efficientllm.runtime.base.errors import UsageError
from efficientllm.train.compute import hardware as heap
from efficientllm.train.compute.loss import TrainingLoss
from efficientllm.train.compute.optimizer import AdamW, clip_factor, gradient_norm, make_optimizer
from efficientllm.train.compute.optimizer import store_gradients_as_computed as store_as_computed
from efficientllm.train.config.sections import OptimizerConfig, TrainConfig
from efficientllm.train.loop import memory
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.pruning import surgery

FRAGMENTS = """
import torch
from efficientllm.runtime.engines.memory import memory_bytes
from efficientllm.train.compute.hardware import keep_freed_pages
from efficientllm.train.compute.hardware import HeapWatch

keep_freed_pages()
watch = HeapWatch()
watch.trim_if_grown()
before = memory_bytes()["rss_bytes"]
tensors = [torch.ones(2**21 if index % 2 else 2**14) for index in range(200)]
small = tensors[::2]
del tensors
held = memory_bytes()["rss_bytes"] - before
assert watch.trim_if_grown()
print(held, memory_bytes()["rss_bytes"] - before)
"""
"""Prints what a heap with holes between small tensors holds, and what is left of that after a look."""

WINDOWS = torch.randint(0, 400, (2, 33), generator=torch.Generator().manual_seed(1))
WIDE = tiny_architecture(layers=(LayerShape(4, 2, 192), LayerShape(2, 1, 256)), hidden_size=128)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    loss, _ = TrainingLoss(model, torch.bfloat16)(WINDOWS)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gradients_of_bf16_products_lose_nothing_in_bf16(family: str) -> None:
    architecture = tiny_architecture(family)
    exact = gradients(tiny_model(architecture).train())
    model = tiny_model(architecture).train()
    store_as_computed(model)
    stored = gradients(model)
    assert {gradient.dtype for gradient in stored.values()} == {torch.bfloat16, torch.float32}
    for name, gradient in exact.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(stored[name].float(), gradient), name


def test_the_optimizer_is_torchs_adamw() -> None:
    ours, theirs = tiny_model(tiny_architecture()), tiny_model(tiny_architecture())
    our_steps = make_optimizer(ours, 1e-2, (0.9, 0.95), 0.1)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    their_steps = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    for _ in range(3):
        gradients(ours)
        gradients(theirs)
        our_steps.step(gradient_scale=clip_factor(gradient_norm(ours.parameters()), 0.5))
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        their_steps.step()
        our_steps.zero_grad()
        their_steps.zero_grad()
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(our, their)


def test_a_step_from_bf16_gradients_is_the_step_from_the_same_numbers_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficientllm.train.compute.optimizer.PIECE", 128)  # rows of 16 at a time
    results = []
    for kept in (True, False):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(50, 16))
        optimizer = AdamW([{"params": [weight], "weight_decay": 0.01}], 1e-2, (0.9, 0.95), torch.float32)
        for _ in range(3):
            gradient = torch.randn(50, 16).bfloat16()
            weight.grad_dtype = torch.bfloat16 if kept else torch.float32
            weight.grad = gradient if kept else gradient.float()
            optimizer.step(gradient_scale=torch.tensor(0.3))
            weight.grad = None
        results.append(weight.detach())
    assert torch.equal(*results)


@pytest.mark.slow
def test_bf16_moments_train_as_fp32_ones_do_and_resume_bit_identically(
    source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        arguments = command(source_folder, corpus, tmp_path / dtype, "--optimizer-dtype", dtype)
        assert run(arguments) == 0
        losses[dtype] = torch.tensor([record["loss"] for record in metrics(tmp_path / dtype) if "loss" in record])
    assert losses["float32"][0] - losses["float32"][-1] > 0.1  # there is something to miss
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], atol=0.02, rtol=0)

    arguments = command(source_folder, corpus, tmp_path / "resumed", "--optimizer-dtype", "bfloat16")
    run_until(10, arguments)
    assert run([*arguments, "--resume"]) == 0
    expect_equal_weights(tmp_path / "resumed", tmp_path / "bfloat16")


def test_a_decay_that_bf16_cannot_follow_is_refused(
    source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    arguments = command(source_folder, corpus, tmp_path / "run", "--optimizer-dtype", "bfloat16", "--beta2", "0.999")
    assert run(arguments) == 2
    assert "--beta2 0.999: must be at most 0.98 with --optimizer-dtype bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "bytes_per_parameter"), [("float32", 12), ("bfloat16", 8)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_stores_every_parameter_once(
    tied: bool, dtype: str, bytes_per_parameter: int, save_tiny: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    architecture = replace(WIDE, tie_word_embeddings=tied, vocab_size=4000)
    arguments = command(save_tiny(architecture), corpus, tmp_path / "run", "--optimizer-dtype", dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efficientllm.train.run.write_result", lambda trainer: None)  # its checkpoints stay
        assert run([*arguments, "--target-ratio", "1.0"]) == 0
    state = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "state"
    size = sum(file.stat().st_size for file in state.iterdir())
    headers = 2500 * 3 * sum(1 for _ in tiny_model(architecture).parameters())
    assert size == pytest.approx(bytes_per_parameter * architecture.num_parameters, abs=headers)


# -- what is alive


def test_a_removal_holds_no_old_tensor_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(WIDE).train()
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.95), 0.01)
    gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    old = [weakref.ref(parameter) for parameter in model.parameters()]
    old += [weakref.ref(state["exp_avg"]) for state in optimizer.state.values()]
    alive = []
    update_modules = surgery._update_modules

    def counting(*arguments: Any) -> None:
        alive.append(sum(reference() is not None for reference in old))
        update_modules(*arguments)

    monkeypatch.setattr(surgery, "_update_modules", counting)
    surgery.remove_groups(model, some_removal(WIDE, ("ffn", "stem")), optimizer)
    assert alive == [0]


@pytest.mark.parametrize("more", [["--init", "random"], ["--resume"]])
def test_weights_that_are_not_trained_are_not_kept(
    more: list[str], source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from efficientllm.train import run as run_module
    from efficientllm.train.loop.trainer import Stopped

    arguments = command(source_folder, corpus, tmp_path / "run", *(more if more != ["--resume"] else []))
    if more == ["--resume"]:
        with monkeypatch.context() as patch:
            patch.setattr(run_module.Trainer, "train", lambda self, write_model: self.checkpoints.save() and Stopped())
            assert run(arguments) == 130
    held = []
    make_model = run_module._make_model

    def looking(plan: Any, source: Any) -> Any:
        model = make_model(plan, source)
        held.append({parameter.device.type for parameter in source.parameters()})
        return model

    monkeypatch.setattr(run_module, "_make_model", looking)
    assert run([*arguments, *more]) == 0
    assert held == [{"meta"}]


PEAK = """
import sys
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.engines.memory import memory_bytes
from efficientllm.train import cli, run
before = memory_bytes()["rss_bytes"]
assert run_command(cli.body, sys.argv[1:]) == 0
print("training took", memory_bytes()["peak_rss_bytes"] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_training_takes_no_more_than_it_must(save_tiny: Callable[..., Path], corpus: Path, tmp_path: Path) -> None:
    """Weights, gradients and bf16 moments, a tenth for fragments, and 200 MB of libraries' own.

    Removal and checkpoints add nothing.
    """
    layers = (LayerShape(8, 8, 2048), LayerShape(8, 4, 1536), LayerShape(4, 4, 2560)) * 2
    architecture = tiny_architecture(layers=layers, hidden_size=1024, head_dim=64)
    arguments = command(save_tiny(architecture), corpus, tmp_path / "run", "--optimizer-dtype", "bfloat16")
    arguments += ["--tokens", "256", "--batch-size", "1", "--target-ratio", "0.9", "--prune", "attention,ffn"]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    peak = int(done.stdout.split("training took")[1].split()[0])
    assert peak <= 1.1 * (4 + 4 + 2 * 2) * architecture.num_parameters + 200e6


# -- the estimate


def test_a_heap_in_pieces_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """At GROWTH times what the first step since the last time left, and as often as it takes."""
    held = iter([100, 109, 114, 116, 70, 80, 81])
    monkeypatch.setattr(heap, "memory_bytes", lambda: {"rss_bytes": next(held)})
    given_back = []
    monkeypatch.setattr(heap, "trim_heap", lambda: given_back.append(True))
    watch = heap.HeapWatch()
    assert [watch.trim_if_grown() for _ in range(7)] == [False, False, False, True, False, False, True]
    assert len(given_back) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_holes_between_tensors_that_stay_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FRAGMENTS], capture_output=True, text=True, check=True)
    held, left = map(int, done.stdout.split())
    assert held > 800e6
    assert left < 50e6


def test_memory_of_a_run_names_its_parts() -> None:
    architecture = tiny_architecture(layers=(LayerShape(8, 8, 4096),) * 16, hidden_size=2048)
    size, config = architecture.num_parameters, TrainConfig()
    plain = memory.training_memory(config, architecture, torch.float32)
    assert (plain.weights, plain.gradients, plain.moments) == (4 * size, 4 * size, 8 * size)
    small = replace(config, optimizer=OptimizerConfig(optimizer_dtype="bfloat16"))
    assert memory.training_memory(small, architecture, torch.float32).moments == 4 * size
    kept = memory.training_memory(config, architecture, torch.bfloat16, keeps_products=True)
    assert 2 * size < kept.gradients < 2.1 * size
    assert memory.training_memory(config, architecture, torch.float32, shards=4).weights == size


def test_run_beyond_the_memory_is_refused_before_the_source_is_read(
    source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("efficientllm.train.loop.plan.device_memory", lambda *_: memory.Memory(1_000, 500))
    monkeypatch.setattr("efficientllm.train.loop.plan.load_for_ranks", lambda *_: pytest.fail("the source was read"))
    assert run(command(source_folder, corpus, tmp_path / "run")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--source {source_folder}: training takes " in error
    assert "there are 1.0 kB: try --optimizer-dtype bfloat16 or a smaller --source" in error


def test_run_that_may_not_fit_gets_a_warning() -> None:
    needed, config = memory.TrainingMemory(400, 400, 800), TrainConfig()
    assert memory.check_memory(needed, memory.Memory(3000, 1900), config) == ""
    assert memory.check_memory(needed, memory.Memory(1700, 1500), config).startswith("1.5 kB are free now")
    with pytest.raises(UsageError, match="a smaller --source"):
        memory.check_memory(needed, memory.Memory(1599, 1500), config)


def test_this_machine_reports_its_memory() -> None:
    found = memory.device_memory(torch.device("cpu"), processes=2)
    assert (found is None) == (not Path("/proc/meminfo").exists())
    assert found is None or 0 < found.free <= found.total
