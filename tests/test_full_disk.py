"""A disk that fills while a run or an export writes: one line, and the last checkpoint goes on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from disks import grow, small_disk
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException
from training import ERRORS, command, expect_equal_weights, run

from efficientllm.export import cli as export_cli
from efficientllm.runtime.base import files as disk
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import DiskFullError
from efficientllm.runtime.base.files import folder_written_atomically
from efficientllm.runtime.base.output import check_place
from efficientllm.train.checkpoint import state as training_state
from efficientllm.train.checkpoint.run_folder import damage
from efficientllm.train.reporting.metrics import MetricsWriter


def error_line(capsys: ERRORS) -> str:
    """The one line of the error, below those of progress."""
    *progress, last = capsys.readouterr().err.strip().splitlines()
    assert not any(line.startswith(("error", "Traceback", " ")) for line in progress), progress
    assert last.startswith("error: ")
    return last


WHERE = {
    8: "metrics.jsonl",
    40: ".png",
    500: "run/model",
    1200: "checkpoints/step-00000005",
    3000: "checkpoints/step-00000010",
}
"""kB of a disk to what does not fit: the model takes 0.4 MB, the first checkpoint about 2.2, the second 1.5."""


# Python 3.13 shows what torch's writer cannot flush when it is collected
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*NoCloseWriter:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kilobytes", WHERE)
@pytest.mark.usefixtures("drawn_pictures")
def test_run_on_a_full_disk_ends_in_one_line_and_resumes_with_room(
    kilobytes: int,
    straight: Path,
    source_folder: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: ERRORS,
) -> None:
    if "checkpoints" in WHERE[kilobytes]:  # as where something else fills the disk between the look and the write
        monkeypatch.setattr(training_state, "state_bytes", lambda model, optimizer: 0)
    with small_disk(tmp_path / "disk", kilobytes) as folder:
        arguments = command(source_folder, corpus, folder / "run")
        assert run(arguments) == 2
        error = error_line(capsys)
        assert f"{WHERE[kilobytes]} cannot be written: the disk is full (" in error
        kept = [*(folder / "run" / "checkpoints").glob("*")]
        assert f"make room and {f'--resume from {kept[-1].name}' if kept else 'start again'}" in error
        assert [damage(checkpoint) for checkpoint in kept] == [""] * len(kept)
        grow(folder, 20_000)
        assert run([*arguments, "--resume"]) == 0
        expect_equal_weights(folder / "run", straight)


@pytest.mark.parametrize(
    "more", [("gguf", "--quantize", "f32"), ("hf-uniform",), ("onnx", "--quantize", "f32")], ids=lambda more: more[0]
)
def test_export_on_a_full_disk_gives_one_line(
    more: tuple[str, ...], source_folder: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    with small_disk(tmp_path / "disk", 300) as folder:
        arguments = [str(source_folder), "--output", str(folder / "artefact"), "--no-verify", "--target", *more]
        assert run_command(export_cli.body, arguments) == 2
        assert "artefact cannot be written: the disk is full (" in error_line(capsys)
        assert not any(folder.iterdir())


def fails_as_torch(path: Path) -> None:
    raise RuntimeError("unexpected pos 704 vs 598")


def fails_as_safetensors(path: Path) -> None:
    raise SafetensorError("Error while serializing")


def fails_as_the_system(path: Path) -> None:
    raise ValueError("wrapped") from OSError(28, "No space left on device")


@pytest.mark.parametrize("write", [fails_as_torch, fails_as_safetensors, fails_as_the_system])
def test_a_full_disk_is_recognised_behind_every_library(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=0))
    refused = pytest.raises(DiskFullError, match=r"/target cannot be written: the disk is full \(0 B are free\)")
    with refused, folder_written_atomically(tmp_path / "target") as temporary:
        write(temporary)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.ENOSPC])
def test_full_quota_is_recognised_without_a_message_of_torch(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network drive that accepts what is written, and refuses when it is to be kept."""
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(code, os.strerror(code))))
    reason = "the quota of its owner is used up" if code == errno.EDQUOT else r"\d.*B are free"
    refused = pytest.raises(DiskFullError, match=rf"/target cannot be written: the disk is full \({reason}\)")
    with refused, folder_written_atomically(tmp_path / "target") as temporary:
        fails_as_torch(temporary)
    assert not any(tmp_path.iterdir())


def test_rank_names_the_full_disk_after_another_made_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = training_state.HashingWriter(tmp_path)._create_stream(tmp_path / "a", "wb")
    monkeypatch.setattr(disk, "free_bytes", lambda path: 0)
    with pytest.raises(OSError, match="No space left") as raised, stream:
        fails_as_torch(tmp_path)
    monkeypatch.undo()
    failures: Any = {0: (raised.value, None)}
    with pytest.raises(DiskFullError, match=r"the disk is full \(\d.*B are free\)"), disk.writing(tmp_path / "a"):
        raise CheckpointException("write", failures)


def test_other_failures_keep_their_names(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="unexpected pos"), folder_written_atomically(tmp_path / "a") as temporary:
        fails_as_torch(temporary)
    with pytest.raises(KeyboardInterrupt), disk.writing(tmp_path):
        raise KeyboardInterrupt


def test_a_full_disk_is_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficientllm.runtime.base.output.free_bytes", lambda path: 0)
    with pytest.raises(DiskFullError, match=r"run cannot be written: the disk is full \(0 B are free\); make room"):
        check_place(tmp_path / "run", is_renamed=False)


def test_writer_refuses_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=r"model cannot be written: the disk is full \(it takes 1000000.0 GB, "):
        disk.require_room(tmp_path / "not" / "yet" / "model", 10**15)


def test_record_without_room_damages_no_other(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8) as folder:
        writer = MetricsWriter(folder, is_main=True)
        record: dict[str, Any] = {"step": 1, "tokens": 1, "text": "x" * 1000}
        for _ in range(7):
            writer.write(record)
        with pytest.raises(DiskFullError, match=r"metrics\.jsonl cannot be written"):
            writer.write(record)
        content = (folder / "metrics.jsonl").read_bytes()
    assert content.endswith(b"}\n")
    assert content.count(b"\n") == 7
