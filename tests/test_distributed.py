"""Two-process runs on this machine (gloo) against one process on the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import command, metrics, run, weights

from efficientllm.train.model.architecture import Architecture

pytestmark = pytest.mark.slow


def torchrun(arguments: list[str], processes: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*launcher, "-m", "efficientllm.train.cli", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("mode", "saliency", "space", "more"),
    [
        ("ddp", "taylor1", "attention,ffn,stem", ()),
        ("ddp", "taylor2", "attention,ffn,stem", ()),
        ("ddp", "fisher", "attention,ffn,stem", ("--qat", "q4_0")),
        ("ddp", "token-fisher", "attention,ffn", ()),
        ("ddp", "taylor1", "ffn,blocks", ()),
        ("fsdp", "taylor1", "attention,ffn,stem", ()),
        ("fsdp", "taylor1", "ffn,blocks", ("--qat", "q4_0")),
        ("fsdp --offload", "taylor1", "attention,ffn,stem,blocks", ()),
    ],
)
def test_two_processes_remove_the_same_groups_as_one(
    mode: str,
    saliency: str,
    space: str,
    more: tuple[str, ...],
    source_folder: Path,
    corpus: Path,
    tmp_path: Path,
) -> None:
    """Global batch of 4: two ranks of 2, or one process that accumulates 2 microbatches of 2."""
    shared = ["--batch-size", "2", "--saliency", saliency, "--checkpoint-every", "0", "--prune", space]
    shared += ["--block-tokens", "256", *more]
    one = command(source_folder, corpus, tmp_path / "one", *shared, "--gradient-accumulation", "2")
    assert run(one) == 0
    two = command(source_folder, corpus, tmp_path / "two", *shared, "--data-parallel", *mode.split())
    done = torchrun(two)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"2 ranks ({mode.split()[0]})" in done.stdout
    removed = [[record.get("removed") for record in metrics(tmp_path / name)] for name in ("one", "two")]
    assert removed[0] == removed[1]
    assert Architecture.from_folder(tmp_path / "one" / "model") == Architecture.from_folder(tmp_path / "two" / "model")
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name, tensor in theirs.items():  # sums run in another order, and Adam amplifies rounding where gradients vanish
        assert (ours[name] - tensor).abs().mean() < 1e-4, name


def test_what_every_rank_refuses_is_said_once(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    done = torchrun(command(source_folder, corpus, tmp_path / "run", "--saliency", "best"))
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert [error.partition(";")[0] for error in errors] == ["error: --saliency best: unknown"], done.stderr


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_stopped_distributed_run_resumes_bit_identically(
    mode: str, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """Steps 1 to 10 in one run and the rest in another, against all in one."""
    shared = ["--batch-size", "2", "--data-parallel", mode, "--weight-update", "obs", "--qat", "q4_0"]
    shared += ["--eval-every", "5"]  # right before the checkpoint, too: a forward pass that no backward one follows
    straight = command(source_folder, corpus, tmp_path / "straight", *shared)
    done = torchrun(straight)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = command(source_folder, corpus, tmp_path / "resumed", *shared)
    stopping = subprocess.run(
        [
            *[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
            *["-m", "stop_at_ten", *resumed],
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        timeout=300,
    )
    assert "checkpoint step-00000010 is written" in stopping.stderr, stopping.stderr[-3000:]
    done = torchrun([*resumed, "--resume"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "straight")
    ours, theirs = weights(tmp_path / "resumed"), weights(tmp_path / "straight")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_nothing_of_the_source_is_alive_at_the_end(
    mode: str, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    # a stem channel is in every tensor, so each is replaced where one goes
    more = ["--prune", "stem", "--target-ratio", "0.8"]
    arguments = command(source_folder, corpus, tmp_path / "run", "--batch-size", "2", "--data-parallel", mode, *more)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=1",
        "-m",
        "source_alive",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*launcher, *arguments, "--tokens", "640"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0 of 29 alive" in done.stdout
