"""What a run and an export may destroy (nothing), and what is left where one fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import export_f32
from huggingface_hub import HfApi
from training import (
    ERRORS,
    command,
    expect_equal_weights,
    expect_same_run,
    metrics,
    one_line,
    run,
    run_until,
    weights,
    without,
)

from efficientllm.export import cli as export_cli
from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.base.files import folder_written_atomically
from efficientllm.runtime.base.output import check_output, locked_output
from efficientllm.train import OptimizerConfig, RunConfig, TrainConfig
from efficientllm.train.checkpoint import writer
from efficientllm.train.checkpoint.run_folder import damage, foreign_files
from efficientllm.train.loop import trainer
from efficientllm.train.loop.measuring import Measuring
from efficientllm.train.loop.training_step import TrainingStep


@pytest.fixture(scope="module")
def interrupted(source_folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed at its twelfth step: checkpoints of steps 5 and 10."""
    output = tmp_path_factory.mktemp("interrupted") / "run"
    step = trainer.Trainer._step

    def killed(self: trainer.Trainer) -> dict[str, Any]:
        if self.progress.step == 12:
            raise KeyboardInterrupt
        return step(self)

    trainer.Trainer._step = killed  # type: ignore[method-assign]
    try:
        assert run(command(source_folder, corpus, output)) == 130
    finally:
        trainer.Trainer._step = step  # type: ignore[method-assign]
    return output


@pytest.fixture
def copy(interrupted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


# -- what --overwrite may delete


def test_a_run_deletes_neither_its_corpus_nor_its_source(
    source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    folder = tmp_path / "here"
    shutil.copytree(source_folder, folder / "source")
    shutil.copy(corpus, folder / "text.jsonl")
    for source, text, output in (
        (source_folder, folder / "text.jsonl", folder),
        (folder / "source", corpus, folder / "source"),
        (folder / "source", corpus, folder),
    ):
        assert run(command(source, text, output, "--overwrite")) == 2
        assert "which is read; name another folder" in one_line(capsys)
    assert (folder / "text.jsonl").is_file()
    assert (folder / "source" / "model.safetensors").is_file()


@pytest.mark.parametrize("output", [".", "..", "~", "/", "inner/..", "../cwd"])
def test_the_current_folder_the_home_and_the_root_are_never_written(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "cwd"
    (here / "inner").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UsageError, match=r"is or holds the (current|home) folder"):
        check_output(Path(output).expanduser(), True, lambda folder: [], [], "")


def test_output_folder_refuses_files_and_links_to_inputs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is not a folder; name one"):
        check_output(tmp_path / "file", True, lambda folder: [], [], "")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "text.jsonl").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UsageError, match="which is read"):
        check_output(tmp_path / "link", True, lambda folder: [], [tmp_path / "real" / "text.jsonl"], "")


def test_overwriting_a_run_deletes_the_run(straight: Path, source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(straight, tmp_path / "run"))
    assert foreign_files(folder) == []
    (folder / "model" / "stale.safetensors").write_bytes(b"x")
    assert run(command(source_folder, corpus, folder, "--overwrite")) == 0
    assert not (folder / "model" / "stale.safetensors").exists()


ADDED = ("notes.txt", "model/notes.docx", "checkpoints/mine", "metrics.jsonl.bak", "tensorboard/thesis.txt")


@pytest.mark.parametrize("name", [*ADDED, "checkpoints/step-00000100/precious.bin", ".notes.tmp"])
def test_overwrite_keeps_files_that_users_added_to_a_run(
    name: str, straight: Path, source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    folder = Path(shutil.copytree(straight, tmp_path / "run"))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    assert run(command(source_folder, corpus, folder, "--overwrite")) == 2
    assert f"holds {name.removesuffix('/precious.bin')}, not written by this command" in one_line(capsys)
    assert (folder / name).read_text() == "mine"


def test_overwrite_keeps_models_of_other_tools(
    source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    """A folder with the names of a run's: config.toml and a Hugging Face model."""
    shutil.copytree(source_folder, tmp_path / "mine" / "model")
    (tmp_path / "mine" / "config.toml").write_text("")
    assert run(command(source_folder, corpus, tmp_path / "mine", "--overwrite")) == 2
    assert "holds model, not written by this command" in one_line(capsys)
    assert (tmp_path / "mine" / "model" / "model.safetensors").is_file()


def test_finishing_a_run_deletes_its_checkpoints_only(copy: Path, source_folder: Path, corpus: Path) -> None:
    (copy / "checkpoints" / "step-99999999").mkdir()
    (copy / "checkpoints" / "step-99999999" / "mine").write_text("x")
    truncate(copy / "checkpoints" / "step-00000010" / "tensors.pt")
    assert run(command(source_folder, corpus, copy, "--resume")) == 0
    assert sorted(os.listdir(copy / "checkpoints")) == ["damaged-step-00000010", "step-99999999"]


def test_resume_keeps_files_of_users(
    copy: Path, straight: Path, source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    for checkpoint in list((copy / "checkpoints").iterdir()):
        checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.bak"))
    assert run(command(source_folder, corpus, copy, "--resume")) == 2
    assert "has no checkpoint and holds checkpoints/step-00000005.bak" in one_line(capsys)
    finished = Path(shutil.copytree(straight, tmp_path / "finished"))
    (finished / "model").rename(tmp_path / "elsewhere")
    assert run(command(source_folder, corpus, finished, "--resume")) == 2
    assert "is finished, and its model was moved away" in one_line(capsys)


def test_overwrite_empties_no_folder_that_it_cannot_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mount point: replacing it fails, and what lies in it stays."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    (folder / "old").write_text("x")
    rename = Path.rename

    def busy(self: Path, target: Path) -> Path:
        if self == folder:
            raise OSError(16, "Device or resource busy", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OSError, match="busy"), folder_written_atomically(folder) as temporary:
        (temporary / "new").write_text("y")
    assert os.listdir(folder) == ["old"]
    assert os.listdir(tmp_path) == ["mounted"]


def test_export_keeps_its_source(straight: Path, tmp_path: Path, capsys: ERRORS) -> None:
    folder = Path(shutil.copytree(straight, tmp_path / "run"))
    for output in (folder, folder / "model", tmp_path):
        assert export_f32(folder / "model", output, "--overwrite") == 2
        assert "which is read; name another folder" in one_line(capsys)
    assert (folder / "model" / "model.safetensors").is_file()


def test_an_export_replaces_artefacts_only(straight: Path, tmp_path: Path, capsys: ERRORS) -> None:
    (tmp_path / "precious" / "photos").mkdir(parents=True)
    assert export_f32(straight, tmp_path / "precious", "--overwrite") == 2
    assert "holds photos, not written by this command" in one_line(capsys)
    assert export_f32(straight, tmp_path / "gguf", "--overwrite") == 0
    assert export_f32(straight, tmp_path / "gguf", "--overwrite") == 0
    (tmp_path / "gguf" / "thesis.tex").write_text("mine")
    assert export_f32(straight, tmp_path / "gguf", "--overwrite") == 2
    assert (tmp_path / "gguf" / "thesis.tex").is_file()


# -- two at once

HOLDER = """
import sys, time
from pathlib import Path
from efficientllm.runtime.base.output import locked_output
with locked_output(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_output_are_refused_and_a_killed_one_lets_go(
    source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert run(command(source_folder, corpus, folder)) == 2
    assert f"is being written by process {holder.pid} on " in one_line(capsys)
    assert export_f32(source_folder, folder, "--overwrite") == 2
    assert f"process {holder.pid}" in one_line(capsys)
    holder.kill()
    holder.communicate()
    with locked_output(folder):
        pass
    assert os.listdir(tmp_path) == []


# -- damaged checkpoints


def files_of(checkpoint: Path) -> list[str]:
    return sorted(file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if file.is_file())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink], ids=["truncated", "flipped", "missing"])
def test_every_damaged_file_of_a_checkpoint_is_found(harm: Callable[[Path], None], copy: Path) -> None:
    checkpoint = copy / "checkpoints" / "step-00000010"
    names = files_of(checkpoint)
    assert {"config.json", "contents.json", "tensors.pt", "trainer.json", "state/.metadata"} <= set(names)
    for name in names:
        file = checkpoint / name
        before = file.read_bytes()
        harm(file)
        assert damage(checkpoint), name
        file.write_bytes(before)
    assert damage(checkpoint) == ""


def test_resume_falls_back_to_the_checkpoint_before(
    copy: Path, straight: Path, source_folder: Path, corpus: Path, capsys: ERRORS
) -> None:
    state = next((copy / "checkpoints" / "step-00000010" / "state").glob("*.distcp"))
    truncate(state)
    step = trainer.Trainer._step
    seen: list[list[str]] = []

    def looking(self: trainer.Trainer) -> dict[str, Any]:
        seen.append(sorted(os.listdir(copy / "checkpoints")))
        return step(self)

    trainer.Trainer._step = looking  # type: ignore[method-assign]
    try:
        assert run(command(source_folder, corpus, copy, "--resume")) == 0
    finally:
        trainer.Trainer._step = step  # type: ignore[method-assign]
    output = capsys.readouterr().out
    assert f"step-00000010 is damaged (state/{state.name} has " in output
    assert "resuming from step-00000005" in output
    assert seen[0] == ["damaged-step-00000010", "step-00000005"]
    expect_same_run(copy, straight)


def test_resume_names_missing_checkpoints(copy: Path, source_folder: Path, corpus: Path, capsys: ERRORS) -> None:
    for checkpoint in (copy / "checkpoints").iterdir():
        (checkpoint / "tensors.pt").unlink()
    assert run(command(source_folder, corpus, copy, "--resume")) == 2
    assert "no checkpoint in" in (error := one_line(capsys))
    assert "step-00000010: tensors.pt is missing" in error


# -- steps that are skipped, and runs that diverge


def test_nothing_is_removed_in_a_skipped_step(
    source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate = TrainingStep._accumulate_gradients
    monkeypatch.setattr(
        TrainingStep,
        "_accumulate_gradients",
        lambda self, rows: float("nan") if 4 <= self.progress.step < 9 else accumulate(self, rows),
    )
    assert run(command(source_folder, corpus, tmp_path / "run")) == 0
    records = [record for record in metrics(tmp_path / "run") if "loss" in record]
    assert [record["step"] for record in records if record.get("skipped")] == [5, 6, 7, 8, 9]
    assert not any("removed" in record for record in records if record.get("skipped"))
    assert records[-1]["parameters"] < records[0]["parameters"]


def test_diverged_run_resumes_with_a_lower_learning_rate(
    source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    """Weights that give no finite loss are in no checkpoint, so --resume has a sound one to go on from."""
    arguments = command(source_folder, corpus, tmp_path / "run", "--checkpoint-every", "1")
    run_until(4, arguments)
    arguments = without(arguments, "--learning-rate")
    capsys.readouterr()
    assert run([*arguments, "--resume", "--learning-rate", "1e18", "--max-grad-norm", "1e30"]) == 2
    assert "--resume with a lower --learning-rate" in one_line_of(capsys)
    assert run([*arguments, "--resume", "--learning-rate", "1e-4"]) == 0
    assert "--learning-rate has changed" in capsys.readouterr().out
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run").values())


def one_line_of(capsys: ERRORS) -> str:
    """The last line, below those of progress."""
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_that_ends_in_nonsense_writes_no_model(
    source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    """It ends before ten steps in a row are skipped."""
    wild = command(source_folder, corpus, tmp_path / "run", "--max-grad-norm", "1e30", "--lr-warmup", "0")
    wild[wild.index("--learning-rate") + 1] = "1e18"
    wild[wild.index("--tokens") + 1] = "768"
    assert run([*wild, "--checkpoint-every", "0"]) == 2
    assert "no model is written: start again with a lower --learning-rate" in one_line_of(capsys)
    assert not (tmp_path / "run" / "model").exists()


def test_damaged_config_gives_one_line_and_odd_settings_come_back(
    copy: Path, source_folder: Path, corpus: Path, capsys: ERRORS
) -> None:
    (copy / "config.toml").write_bytes(b"\xff\xfe")
    assert run(command(source_folder, corpus, copy, "--resume")) == 2
    assert "config.toml is damaged" in one_line(capsys)
    config = TrainConfig(run=RunConfig(output="runs/😀"), optimizer=OptimizerConfig(max_grad_norm=float("inf")))
    assert flags.merge(TrainConfig(), flags.read_toml(config.to_toml()), "") == config


# -- the end of a run


def stop_while_measuring(name: str, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> list[str]:
    """Send a signal when a measurement of the final model begins; returns the folder's files at that time."""
    measure, seen = getattr(Measuring, name), []

    def stopping(self: Measuring, stage: str, *more: Any) -> None:
        if stage == "final":
            seen.extend(sorted(os.listdir(self.metrics.path.parent)))
            os.kill(os.getpid(), number)
        measure(self, stage, *more)

    monkeypatch.setattr(Measuring, name, stopping)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measurement", "number", "more"),
    [("stage", signal.SIGTERM, ("--qat", "q4_0", "--checkpoint-every", "0")), ("quality", signal.SIGINT, ())],
)
def test_a_stop_while_the_final_model_is_measured_keeps_it_and_only_the_measuring_is_repeated(
    measurement: str,
    number: int,
    more: tuple[str, ...],
    source_folder: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: ERRORS,
) -> None:
    straight = command(source_folder, corpus, tmp_path / "straight", *more, "--quality")
    assert run(straight) == 0
    folder = tmp_path / "stopped"
    arguments = command(source_folder, corpus, folder, *more, "--quality")
    with monkeypatch.context() as patch:
        seen = stop_while_measuring(measurement, patch, number)
        capsys.readouterr()
        assert run(arguments) == 130
    assert {"model", "checkpoints"} <= set(seen)
    name = signal.Signals(number).name
    expected = f"stopped by {name} while the final model was measured; {folder / 'model'} is written"
    assert one_line_of(capsys) == f"{expected}; --resume repeats only the measuring"
    expect_equal_weights(folder, tmp_path / "straight")
    assert (folder / "checkpoints" / "step-00000020").is_dir()
    assert foreign_files(folder) == []
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", lambda self: pytest.fail("it was trained to its end"))
        assert run([*arguments, "--resume"]) == 0
    assert metrics(folder) == metrics(tmp_path / "straight")
    for file in sorted((tmp_path / "straight" / "model").iterdir()):
        ours, theirs = (folder / "model" / file.name).read_bytes(), file.read_bytes()
        if file.name == "training.json":
            ours, theirs = (json.dumps(json.loads(each) | {"seconds": 0}).encode() for each in (ours, theirs))
        assert ours == theirs or file.name == "README.md", file.name  # which says how many seconds it took
    assert sorted(os.listdir(folder)) == sorted(os.listdir(tmp_path / "straight"))
    assert run([*arguments, "--resume"]) == 2
    assert "is finished; its model is" in one_line_of(capsys)


def test_a_model_that_was_not_measured_and_has_no_checkpoint_is_not_trained_again(
    source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    """The disk had room for the model alone."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with monkeypatch.context() as patch:
        stop_while_measuring("stage", patch)
        assert run(command(source_folder, corpus, tmp_path / "run")) == 130
    assert one_line_of(capsys).endswith("is written; measure it with efficientllm-eval")
    assert run(command(source_folder, corpus, tmp_path / "run", "--resume")) == 2
    assert "holds a model that was not measured and no checkpoint" in one_line_of(capsys)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


# -- the disk and the text


def test_a_disk_that_is_too_small_for_a_checkpoint_stops_no_run(
    straight: Path, source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    assert run(command(source_folder, corpus, tmp_path / "run")) == 0
    assert "no checkpoint of step 5: it takes " in (said := capsys.readouterr().err)
    assert "the disk has 1.0 MB; the run continues" in said
    expect_equal_weights(tmp_path / "run", straight)


def with_bad_line(corpus: Path, folder: Path) -> Path:
    """A corpus whose last line is cut off; a run of a few steps comes to it."""
    lines = corpus.read_text(encoding="utf-8").splitlines()
    path = folder / "text.jsonl"
    path.write_text("\n".join([*lines, '{"text": "cut o']) + "\n", encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_bad_line_late_in_the_text_loses_nothing_that_was_trained(
    source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    from efficientllm.train.data import documents, packing
    from efficientllm.train.loop import run_text

    monkeypatch.setattr(packing, "SHUFFLE_BLOCK", 60)
    monkeypatch.setattr(documents, "SCANNED_CHARACTERS", 0)  # in a large file
    monkeypatch.setattr(run_text, "COUNTED_CHARACTERS", 0)
    path = with_bad_line(corpus, tmp_path)
    arguments = command(source_folder, path, tmp_path / "run", "--checkpoint-every", "0")
    arguments[arguments.index("--held-out-fraction") + 1] = "0.02"
    arguments[arguments.index("--eval-tokens") + 1] = "32"
    arguments[arguments.index("--tokens") + 1] = "19200"
    assert run(arguments) == 2
    error = one_line_of(capsys)
    assert "line 201 is not a JSON object" in error
    assert "--skip-bad-lines N leaves out up to N such lines" in error
    assert "is written: repair the text and --resume" in error
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "trainer.json").read_text())["progress"]["step"] > 0
    assert run([*arguments, "--resume", "--skip-bad-lines", "1"]) == 0
    assert "skipped: --data" in capsys.readouterr().out
    assert run([*arguments, "--skip-bad-lines", "1", "--output", str(tmp_path / "whole")]) == 0
    expect_equal_weights(tmp_path / "run", tmp_path / "whole")


def test_text_of_another_encoding_gives_one_line(source_folder: Path, tmp_path: Path, capsys: ERRORS) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Caf\xe9 au lait. ".encode("latin-1") * 500)
    assert run(command(source_folder, path, tmp_path / "run")) == 2
    assert "not UTF-8" in one_line(capsys)


def test_damaged_source_weights_give_one_line(
    source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    folder = Path(shutil.copytree(source_folder, tmp_path / "source"))
    truncate(folder / "model.safetensors")
    assert run(command(folder, corpus, tmp_path / "run")) == 2
    assert "model.safetensors is damaged" in one_line(capsys)
    shutil.copy(source_folder / "model.safetensors", folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    assert run(command(folder, corpus, tmp_path / "run")) == 0
    said = capsys.readouterr()
    assert "read by shape: llama" in said.out + said.err


def test_unreachable_hub_is_named_at_once(
    source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    """The hub's libraries ask six times, with pauses of up to 8 s, and say so each time."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("asked again"))
    monkeypatch.setattr(HfApi, "repo_info", without_network)
    arguments = command(source_folder, corpus, tmp_path / "run")
    assert run([*without(arguments, "--source"), "--source", "owner/name"]) == 2
    assert one_line(capsys).startswith(
        "error: --source owner/name: no such folder, not downloaded before, and the hub does"
    )
    assert run_command(export_cli.body, ["owner/name", "--target", "gguf", "--output", str(tmp_path / "x")]) == 2
    assert one_line(capsys).startswith("error: owner/name: no such folder, not downloaded before, and the hub does")
    assert run([*without(arguments, "--data"), "--data", "owner/name@20231101.en"]) == 2
    assert "no hub that may have it can be reached" in one_line(capsys)


def without_network(*anything: Any, **more: Any) -> None:
    raise ConnectionError("Name or service not known")


@pytest.mark.parametrize("name", ["./nowhere", "runs/smal", "../nowhere/model", "nowhere"])
def test_mistyped_folder_asks_no_hub(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    """Asking a hub for it would take half a minute where there is none."""
    (tmp_path / "cwd" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    assert run([*command(Path(name), corpus, tmp_path / "run")[2:], "--source", name]) == 2
    assert one_line(capsys).startswith(f"error: --source {name}: no such folder, and not a hub id")
    assert run_command(export_cli.body, [name, "--target", "gguf", "--output", str(tmp_path / "x")]) == 2
    assert one_line(capsys).startswith(f"error: {name}: no such folder, and not a hub id")
