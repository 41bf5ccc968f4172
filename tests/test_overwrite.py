"""What --overwrite deletes, and when: not before the new run has something to put there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import ERRORS, command, run

from efficientllm.train import run as training_run
from efficientllm.train.checkpoint.run_folder import (
    ASIDE,
    delete_replaced_run,
    foreign_files,
    recover,
    restore_replaced_run,
    stash_run,
)
from efficientllm.train.data import packing
from efficientllm.train.loop import trainer


@pytest.fixture(scope="module")
def finished(source_folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    assert run(command(source_folder, corpus, output, "--tokens", "640")) == 0
    return output


@pytest.fixture
def old(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def changed(arguments: list[str], name: str, value: str) -> list[str]:
    index = arguments.index(name)
    return [*arguments[: index + 1], value, *arguments[index + 2 :]]


def with_late_bad_line(corpus: Path, folder: Path) -> Path:
    path = folder / "text.jsonl"
    path.write_text(corpus.read_text(encoding="utf-8") + '{"text": "cut o\n', encoding="utf-8")
    return path


def bad_line(arguments: list[str], corpus: Path, folder: Path) -> list[str]:
    arguments = changed(arguments, "--data", str(with_late_bad_line(corpus, folder)))
    arguments = changed(changed(arguments, "--held-out-fraction", "0.02"), "--eval-tokens", "32")
    return [*changed(arguments, "--tokens", "19200"), "--checkpoint-every", "0"]


def unreadable(arguments: list[str], corpus: Path, folder: Path) -> list[str]:
    (folder / "texts").mkdir()
    shutil.copy(corpus, folder / "texts" / "a.jsonl")
    (folder / "texts" / "b.parquet").write_bytes(b"PAR1")
    return changed(arguments, "--data", str(folder / "texts"))


def diverging(arguments: list[str], corpus: Path, folder: Path) -> list[str]:
    return [*changed(arguments, "--learning-rate", "1e18"), "--max-grad-norm", "1e30", "--lr-warmup", "0"]


REFUSED: dict[str, tuple[Callable[[list[str], Path, Path], list[str]], str]] = {
    "line": (bad_line, "line 201 is not a JSON object"),
    "file": (unreadable, "b.parquet: "),
    "loss": (diverging, "steps in a row"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_comes_to_nothing_leaves_the_old_one(
    case: str,
    old: Path,
    source_folder: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: ERRORS,
) -> None:
    monkeypatch.setattr(packing, "SHUFFLE_BLOCK", 60)  # so that the late line is met late
    before = content(old)
    change, message = REFUSED[case]
    arguments = changed(command(source_folder, corpus, old, "--overwrite"), "--checkpoint-every", "50")
    assert run(change(arguments, corpus, tmp_path)) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert content(old) == before
    assert not (old / ASIDE).exists()


def test_the_old_run_lies_aside_until_the_first_checkpoint(
    old: Path, source_folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trainer.Trainer._step
    seen: list[tuple[bool, bool]] = []

    def looking(self: trainer.Trainer) -> dict[str, Any]:
        seen.append(((old / ASIDE / "model").is_dir(), (old / "checkpoints").is_dir()))
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "_step", looking)
    assert run(command(source_folder, corpus, old, "--overwrite")) == 0
    assert seen == [(True, False)] * 5 + [(False, True)] * 15
    assert sorted(entry.name for entry in old.iterdir() if entry.name.startswith(".")) == []


def killed_before_its_first_checkpoint(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(self: trainer.Trainer) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", kill)
        patch.setattr(training_run, "restore_replaced_run", lambda folder: False)  # a killed process does not
        assert run(arguments) == 130


def test_after_a_kill_the_old_run_comes_back_with_the_next_command(
    old: Path, source_folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(old)
    arguments = command(source_folder, corpus, old, "--overwrite")
    killed_before_its_first_checkpoint(arguments, monkeypatch)
    assert (old / ASIDE / "model").is_dir()
    assert foreign_files(old) == []
    assert run([*arguments[:-1]]) == 2  # not empty
    recover(old, resumes=False)
    assert content(old) == before


def test_resume_after_a_kill_completes_the_replacement(
    old: Path, source_folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(source_folder, corpus, old, "--overwrite")
    killed_before_its_first_checkpoint(arguments, monkeypatch)
    assert run([*arguments[:-1], "--resume"]) == 0
    assert "tokens = 2560" in (old / "config.toml").read_text()
    assert not (old / ASIDE).exists()


def test_a_kill_at_any_rename_loses_nothing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(old)
    rename = Path.rename
    left: list[int] = []

    def mortal(self: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", mortal)
    for moment in range(25):
        left[:] = [moment]
        try:
            stash_run(old)
            (old / "metrics.jsonl").write_text("of the new run")
            restore_replaced_run(old)
        except KeyboardInterrupt:
            pass
        left[:] = [100]
        recover(old, resumes=False)
        assert content(old) == before, moment


def test_a_kill_while_the_old_run_is_deleted_keeps_the_new_one(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stash_run(old)
    (old / "config.toml").write_text("of the new run")
    monkeypatch.setattr(shutil, "rmtree", lambda folder, **options: None)
    delete_replaced_run(old)
    monkeypatch.undo()
    recover(old, resumes=False)
    assert os.listdir(old) == ["config.toml"]
