"""Runs of `efficientllm-train` on a tiny source, and reading what they leave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from efficientllm.runtime.base.command import run_command
from efficientllm.train import cli
from efficientllm.train.loop.trainer import Trainer

SETTINGS = [
    *("--sequence-length", "32", "--eval-tokens", "256", "--held-out-fraction", "0.2", "--tokens", "2560"),
    *("--batch-size", "4", "--threads", "1", "--dtype", "float32", "--learning-rate", "1e-3"),
    *("--width-multiple", "2", "--target-ratio", "0.6", "--prune", "attention,ffn,stem", "--checkpoint-every", "5"),
    "--no-quality",
]
"""20 steps that remove something in most."""
TIMES = ("seconds", "data_seconds", "tokens_per_second")
ERRORS = pytest.CaptureFixture[str]


def one_line(capsys: ERRORS) -> str:
    """Return the error of a command, which is all that it wrote to its standard error."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def command(source: Path, corpus: Path, output: Path, *more: str) -> list[str]:
    return ["--source", str(source), "--data", str(corpus), "--output", str(output), *SETTINGS, *more]


def without(arguments: list[str], name: str) -> list[str]:
    """Arguments less one flag and its value."""
    index = arguments.index(name)
    return arguments[:index] + arguments[index + 2 :]


def unpruned(arguments: list[str]) -> list[str]:
    """The same without a target: plain training."""
    return [*without(without(arguments, "--target-ratio"), "--prune"), "--prune", "none"]


def run(arguments: Sequence[str]) -> int:
    return run_command(cli.body, arguments)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without wall times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def expect_equal_weights(one: Path, other: Path) -> None:
    """The final models of two runs are the same, to the bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def expect_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    expect_equal_weights(one, other)


def run_until(last: int, arguments: Sequence[str]) -> None:
    """Run until a signal stops it after step `last`."""
    step = Trainer._step

    def stopping(self: Trainer) -> dict[str, Any]:
        record = step(self)
        if self.progress.step == last:
            self.stop_signal.name = "SIGTERM"
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        assert run(arguments) == 130


def stopped_and_resumed(source: Path, corpus: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    """Run; run again, stopped after the first removal, and resumed: the two must be the same run.

    Returns the folder of the second.
    """
    assert run(command(source, corpus, folder / "straight", *more)) == 0
    step, stopped = Trainer._step, []

    def stopping(self: Trainer) -> dict[str, Any]:
        record = step(self)
        if "removed" in record and not stopped:
            stopped.append(self.progress.step)
            self.stop_signal.name = "SIGTERM"
        return record

    monkeypatch.setattr(Trainer, "_step", stopping)
    arguments = command(source, corpus, folder / "resumed", *more)
    assert run(arguments) == 130
    assert run([*arguments, "--resume"]) == 0
    assert stopped
    expect_same_run(folder / "resumed", folder / "straight")
    return folder / "resumed"
