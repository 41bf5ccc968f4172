"""The score of a job at every size of a run: the run returns to the last size that kept it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
from training import ERRORS, command, expect_same_run, metrics, run, run_until

from efficientllm.runtime.base.progress import ProgressDisplay
from efficientllm.train import run as run_module
from efficientllm.train.config.sections import ScoreConfig
from efficientllm.train.evaluation.torch_model import TorchModel
from efficientllm.train.family.score_keeper import ScoreKeeper, SizeScore
from efficientllm.train.model.architecture import Architecture
from efficientllm.train.model.irregular import architecture_of

SIZES = ["--removals", "4", "--prune-start", "0.2", "--prune-end", "0.6", "--checkpoint-every", "2"]

KEPT = ["--keep-score", "0.9", "--keep", "1", "--checkpoint-every", "1"]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"Lamp {index}"}, {"role": "assistant", "content": "o"}]}
        for index in range(3)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def scored(source: Path, corpus: Path, output: Path, task: Path, *more: str) -> list[str]:
    return command(source, corpus, output, *SIZES, "--task", str(task), "--metric", "contains", *more)


def sizes(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))["sizes"]


@pytest.fixture
def falling(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Score 1 until the second removal and 0.5 after it. Returns the parameters that were scored."""
    found: list[int] = []

    def measure(self: ScoreKeeper, model: TorchModel) -> tuple[float, float]:
        parameters = architecture_of(model.model.config).num_parameters
        found.append(parameters)
        return 1.0 if len(set(found)) <= 2 or parameters >= sorted(set(found))[-2] else 0.5, 0.0

    monkeypatch.setattr(ScoreKeeper, "_measure", measure)
    return found


def test_every_size_is_scored(source_folder: Path, corpus: Path, task: Path, tmp_path: Path, capsys: ERRORS) -> None:
    arguments = scored(source_folder, corpus, tmp_path / "run", task, "--task-tokens", "4", "--checkpoint-every", "0")
    assert run(arguments) == 0
    assert capsys.readouterr().err.count("answering the examples of --task: 3/3") == 5
    found = sizes(tmp_path / "run")
    assert len(found) == 5  # before four removals, and at the end
    assert found[0]["parameters"] == Architecture.from_folder(source_folder).num_parameters
    assert found[-1]["parameters"] == Architecture.from_folder(tmp_path / "run" / "model").num_parameters
    assert [each["size"] for each in found] == sorted((each["size"] for each in found), reverse=True)
    assert all(0 <= each["score"] <= 1 for each in found)
    last = f"{found[-1]['score']:.3f} ± {found[-1]['stderr']:.3f}"
    assert f"Score of the job (contains, 3 examples): {last}." in (tmp_path / "run/model/README.md").read_text()


def test_a_run_returns_to_the_last_size_that_kept_the_score(
    source_folder: Path,
    corpus: Path,
    task: Path,
    tmp_path: Path,
    falling: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: ERRORS,
) -> None:
    load_source = mock.Mock(wraps=run_module.load_source)
    monkeypatch.setattr(run_module, "load_source", load_source)
    arguments = scored(source_folder, corpus, tmp_path / "run", task, "--keep-score", "0.9", "--head-dim", "8")
    assert run(arguments) == 0
    assert load_source.call_args[0][2].head_dim == 8  # the source is read again as at the start
    assert "the run returns to" in capsys.readouterr().err
    final = Architecture.from_folder(tmp_path / "run" / "model")
    assert final.num_parameters == falling[1]
    assert falling[2] < falling[1]
    records = [each for each in metrics(tmp_path / "run") if "loss" in each]
    assert [each["step"] for each in records] == list(range(1, 21))
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_final_score_below_the_limit_is_reported(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    monkeypatch.setattr(ScoreKeeper, "_measure", lambda self, model: (0.5, 0.0))
    keeper = ScoreKeeper(ScoreConfig(task=str(task), keep_score=0.9), tmp_path, False, ProgressDisplay())
    keeper.sizes, keeper.smallest = [SizeScore(1, 10, 10.0, 1.0, 0.0)], 5.0
    keeper.check(cast(TorchModel, None), 3, 5, 5.0)
    assert "that is below 0.9 of it, though it was not when the run returned" in capsys.readouterr().err


def test_a_share_of_no_score_cannot_be_kept(
    source_folder: Path, corpus: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    monkeypatch.setattr(ScoreKeeper, "_measure", lambda self, model: (0.0, 0.0))
    assert run(scored(source_folder, corpus, tmp_path / "run", task, "--keep-score", "0.9")) == 2
    assert "--keep-score 0.9: the whole model has a score of 0.000" in capsys.readouterr().err


@pytest.mark.parametrize("stopped", [[], [7], [8], [11]])
def test_no_later_checkpoint_replaces_the_kept_one(
    stopped: list[int], source_folder: Path, corpus: Path, task: Path, tmp_path: Path, falling: list[int]
) -> None:
    arguments = scored(source_folder, corpus, tmp_path / "run", task, *KEPT)
    for last in stopped:
        run_until(last, arguments)
    assert run([*arguments, *["--resume"] * len(stopped)]) == 0
    assert Architecture.from_folder(tmp_path / "run" / "model").num_parameters == falling[1]


def test_nothing_is_deleted_if_the_kept_checkpoint_is_damaged(
    source_folder: Path, corpus: Path, task: Path, tmp_path: Path, falling: list[int], capsys: ERRORS
) -> None:
    arguments = scored(source_folder, corpus, tmp_path / "run", task, *KEPT)
    run_until(8, arguments)
    min((tmp_path / "run" / "checkpoints").iterdir()).joinpath("tensors.pt").write_bytes(b"damaged")
    assert run([*arguments, "--resume"]) == 2
    assert "no sound checkpoint of a size that kept it is left" in capsys.readouterr().err
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


@pytest.mark.slow
def test_a_run_that_returned_is_resumed_bit_identically(
    source_folder: Path, corpus: Path, task: Path, tmp_path: Path, falling: list[int]
) -> None:
    assert run(scored(source_folder, corpus, tmp_path / "straight", task, "--keep-score", "0.9")) == 0
    falling.clear()
    arguments = scored(source_folder, corpus, tmp_path / "stopped", task, "--keep-score", "0.9")
    run_until(15, arguments)
    shutil.copytree(tmp_path / "stopped", tmp_path / "resumed")
    arguments[arguments.index("--output") + 1] = str(tmp_path / "resumed")
    assert run([*arguments, "--resume"]) == 0
    expect_same_run(tmp_path / "resumed", tmp_path / "straight")
