"""What a teacher made of text is kept, and a run that reads it is the run that computes it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_architecture, tiny_model
from torch import nn
from training import command, expect_same_run, metrics, run

from efficientllm.runtime.base.errors import DiskFullError
from efficientllm.train import run as training_run
from efficientllm.train.compute import teacher_cache
from efficientllm.train.compute.loss import LossWeights, TrainingLoss, frozen_copy
from efficientllm.train.compute.teacher_cache import TeacherCache
from efficientllm.train.model.source import content_key

TOKENS = torch.arange(30).view(3, 10)


def some_states(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 10, 6, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture
def teachers_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every batch that a run's teacher reads."""
    passes: list[int] = []

    def counted(source: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
        teacher = frozen_copy(source, dtype, device)
        teacher.model.register_forward_pre_hook(lambda module, arguments: passes.append(1))
        return teacher

    monkeypatch.setattr(training_run, "frozen_copy", counted)
    return passes


@pytest.mark.slow
def test_a_run_with_known_states_is_the_run_that_computes_them(
    source_folder: Path, corpus: Path, tmp_path: Path, teachers_passes: list[int]
) -> None:
    common, cache = ["--distill", "1", "--checkpoint-every", "0"], ["--teacher-cache", str(tmp_path / "cache")]
    folders, computed = {}, {}
    for name, more in (("without", []), ("first", cache), ("second", cache)):
        folders[name] = tmp_path / name
        teachers_passes.clear()
        assert run(command(source_folder, corpus, folders[name], *common, *more)) == 0
        computed[name] = len(teachers_passes)
    steps = len([record for record in metrics(folders["without"]) if "loss" in record])
    assert computed == {"without": steps, "first": steps, "second": 0}
    for name in ("first", "second"):
        expect_same_run(folders[name], folders["without"])


def test_other_weights_are_another_teacher(
    source_folder: Path, corpus: Path, tmp_path: Path, teachers_passes: list[int]
) -> None:
    more = ["--distill", "1", "--checkpoint-every", "0", "--teacher-cache", str(tmp_path / "cache")]
    assert run(command(source_folder, corpus, tmp_path / "first", *more)) == 0
    teachers_passes.clear()
    assert run(command(tmp_path / "first" / "model", corpus, tmp_path / "second", *more)) == 0
    assert teachers_passes
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_another_setting_of_the_same_weights_is_another_teacher() -> None:
    def key(theta: float, name: str = "") -> str:
        model = tiny_model(tiny_architecture())
        model.config.rope_parameters["rope_theta"] = theta
        model.config._name_or_path = name
        return content_key(model)

    assert key(10_000.0) == key(10_000.0, "elsewhere") != key(500_000.0)


def test_a_cache_that_goes_away_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TeacherCache(tmp_path / "cache" / "key", torch.bfloat16)
    cache.keep(TOKENS, some_states())
    shutil.rmtree(tmp_path / "cache")
    assert cache.find(TOKENS, 6) is None
    (tmp_path / "cache").write_text("a file in the way")
    with caplog.at_level(logging.WARNING, logger="efficientllm.train"):
        cache.keep(TOKENS, some_states())
        cache.keep(TOKENS, some_states())
    assert cache.find(TOKENS, 6) is None
    assert len(caplog.records) == 1


def test_room_is_left_for_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TeacherCache(tmp_path, torch.bfloat16, reserve_bytes=2**60)
    with caplog.at_level(logging.WARNING, logger="efficientllm.train"):
        cache.keep(TOKENS, some_states())
    assert "which checkpoints may need" in caplog.text
    assert not list(tmp_path.iterdir())


def test_what_is_kept_is_found_whole_or_not_at_all(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, torch.bfloat16)
    assert cache.find(TOKENS, 6) is None
    states = some_states()
    cache.keep(TOKENS, states)
    found = cache.find(TOKENS, 6)
    assert found is not None
    assert torch.equal(found, states)
    assert cache.find(TOKENS, 8) is None
    assert cache.find(TOKENS[:, :-1], 6) is None
    assert cache.find(torch.cat([TOKENS, TOKENS[:1] + 1]), 6) is None  # one window is new: the batch is computed


@pytest.mark.parametrize("damage", ["flipped", "shortened", "emptied"])
def test_a_damaged_file_is_computed_again(damage: str, tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, torch.bfloat16)
    cache.keep(TOKENS, some_states())
    path = next(path for path in tmp_path.glob("*/*") if path.is_file())
    content = path.read_bytes()
    flipped = content[:7] + bytes([content[7] ^ 1]) + content[8:]
    changed = {"flipped": flipped, "shortened": content[:-1], "emptied": b""}
    path.write_bytes(changed[damage])
    assert cache.find(TOKENS, 6) is None
    cache.keep(TOKENS, some_states())
    assert cache.find(TOKENS, 6) is not None


def test_a_full_disk_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def write(path: Path, content: bytes) -> None:
        raise DiskFullError(path, "no space left")

    monkeypatch.setattr(teacher_cache, "write_bytes_atomically", write)
    cache = TeacherCache(tmp_path, torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="efficientllm.train"):
        cache.keep(TOKENS, some_states())
        cache.keep(TOKENS + 1, some_states())
    assert len(caplog.records) == 1
    assert "no longer cached" in caplog.text


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


@pytest.mark.parametrize("place", ["a file", "no distillation"])
def test_bad_places_are_one_line(
    place: str, source_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("text")
    more = ["--teacher-cache", str(tmp_path / "cache"), *(["--distill", "1"] if place == "a file" else [])]
    assert run(command(source_folder, corpus, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cache" in error
    assert not (tmp_path / "run" / "model").exists()
