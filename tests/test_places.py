"""Where a run and an export may be written, and files of a run that somebody damaged: refused at once, or working."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from disks import read_only, small_disk
from exporting import export_f32
from training import ERRORS, command, metrics, one_line, run

from efficientllm.runtime.base import output as outputs
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.base.output import LOCK_NAME, check_output, check_place, locked_output
from efficientllm.train.loop import trainer
from efficientllm.train.reporting.metrics import MetricsWriter, RunProgress, read_metrics

# -- links and mounted folders


def test_export_into_a_link_replaces_its_target(source_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "link").symlink_to("volume/artefact")  # leads nowhere yet
    for more in ([], ["--overwrite"]):
        assert export_f32(source_folder, tmp_path / "link", *more) == 0
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "volume" / "artefact" / "manifest.json").is_file()
        assert os.listdir(tmp_path / "volume") == ["artefact"]


def test_a_run_into_a_link_lies_where_it_leads(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("volume/run")
    arguments = command(source_folder, corpus, tmp_path / "link", "--tokens", "640")
    for more in ([], ["--overwrite"]):
        assert run([*arguments, *more]) == 0
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "volume" / "run" / "model").is_dir()


def test_circular_links_and_impossible_names_give_one_line(
    source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").write_text("x")
    for name in ("circle", "a\0b", "\udcff", "circle/run", "file/run", "x" * 300):
        assert run(command(source_folder, corpus, tmp_path / name)) == 2, name
        one_line(capsys)
        assert export_f32(source_folder, tmp_path / name) == 2, name
        one_line(capsys)
    assert sorted(os.listdir(tmp_path)) == ["circle", "file"]


def test_names_that_are_not_utf_8_are_refused_at_once(tmp_path: Path) -> None:
    for output, inputs in ((tmp_path / "\udcff", []), (tmp_path / "run", ["text-\udcff.jsonl"])):
        with pytest.raises(UsageError, match=r"the name '.*\\udcff.*' is not UTF-8; give another one"):
            check_output(output, False, lambda folder: [], inputs, "")


def test_a_volume_below_a_read_only_folder_holds_runs_and_artefacts(
    source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    """As in a container, where the root cannot be written."""
    volume = tmp_path / "outer" / "volume"
    volume.mkdir(parents=True)
    with read_only(tmp_path / "outer"), small_disk(volume, 20_000):
        for more in ([], ["--overwrite"]):
            assert run(command(source_folder, corpus, volume, "--tokens", "640", *more)) == 0
            assert not (volume / LOCK_NAME).exists()
        assert (volume / "model").is_dir()
        with locked_output(volume):
            capsys.readouterr()
            assert run(command(source_folder, corpus, volume, "--overwrite")) == 2
            assert "is being written by process" in one_line(capsys)
        assert export_f32(volume / "model", volume / "gguf") == 0
        assert run(command(source_folder, corpus, tmp_path / "outer" / "run")) == 2
        assert "outer cannot be written; name another folder" in capsys.readouterr().err


def test_an_export_does_not_take_the_place_of_a_mounted_folder(
    source_folder: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    with small_disk(tmp_path / "disk", 20_000) as folder:
        assert export_f32(source_folder, folder) == 2
        assert "is a mount point, which cannot be replaced; name a folder in it" in one_line(capsys)


def test_a_place_that_cannot_be_written_is_found_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    refused: list[Path] = []
    monkeypatch.setattr(outputs, "_takes_files", lambda folder: folder not in refused)
    for place, is_renamed, written in (
        ("there", False, "there"),
        ("there", True, "."),
        ("not/yet", False, "."),
        ("there/not/yet", True, "there"),
    ):
        refused[:] = [tmp_path / written]
        with pytest.raises(UsageError, match=r"cannot be written; name another folder"):
            check_place(tmp_path / place, is_renamed)
        refused.clear()
        check_place(tmp_path / place, is_renamed)


# -- damaged files of a run


def test_wrong_configuration_gives_one_line(tmp_path: Path, capsys: ERRORS) -> None:
    path = tmp_path / "config.toml"
    wrong = (b"\xff\xfe\x00binary", b"tokens = ", b"a = " + b"[" * 100_000, b"tokens = 1\n\0")
    marked = b"\xef\xbb\xbftokens = '" + b"9" * 400 + b"'"  # Notepad's byte order mark, which is no part of the TOML
    refused = f"--config {path}: not valid TOML: "
    for content, reason in (*((each, refused) for each in wrong), (marked, "999999999... is too large")):
        path.write_bytes(content)
        assert run(["--config", str(path), "--output", str(tmp_path / "run")]) == 2
        assert reason in one_line(capsys)
    assert run(["--config", str(tmp_path), "--output", str(tmp_path / "run")]) == 2
    assert str(tmp_path) in one_line(capsys)


NOISE = [b"\xff\xfe\x00", b'{"step": 3, "tok', b"[1, 2]", b"{}", b'{"step": "x", "tokens": 1}', b"[" * 100_000]


def test_damaged_records_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sound = [{"step": step, "tokens": step * 10, "loss": 1.5} for step in range(1, 6)]
    lines = [json.dumps(record).encode() for record in sound]
    mixed = [line for pair in zip(lines, NOISE, strict=False) for line in pair]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*mixed, NOISE[-1], b'{"step": 6, "tokens": 60, "lo']))
    assert read_metrics(tmp_path) == sound
    MetricsWriter(tmp_path, is_main=True).truncate(RunProgress(step=3))
    assert metrics(tmp_path) == sound[:3]
    assert caplog.messages == [f"{tmp_path / 'metrics.jsonl'}: 6 damaged lines are skipped"]


def test_run_resumes_with_damaged_records(
    source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    step = trainer.Trainer._step

    def killed(self: trainer.Trainer) -> dict[str, Any]:
        if self.progress.step == 12:
            raise KeyboardInterrupt
        return step(self)

    arguments = command(source_folder, corpus, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", killed)
        assert run(arguments) == 130
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"\xff\x00" * 500 + b"\n")
    assert run([*arguments, "--resume"]) == 0
    assert "metrics.jsonl: 1 damaged lines are skipped" in capsys.readouterr().out
    assert [record["step"] for record in metrics(tmp_path / "run") if "loss" in record] == [*range(11, 21)]
