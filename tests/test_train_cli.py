"""Runs of `efficientllm-train` on a tiny source: results, resuming, and what bad input gets."""

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
from tiny import LLAMA3_ROPE, tiny_architecture
from training import ERRORS, command, expect_same_run, metrics, run, run_until, unpruned, without

from efficientllm.train import cli
from efficientllm.train.compute.loss import TrainingLoss
from efficientllm.train.model.architecture import Architecture
from efficientllm.train.model.source import load_for_inference


def test_run_reaches_the_target_and_leaves_a_loadable_model(straight: Path, source_folder: Path) -> None:
    summary = json.loads((straight / "model" / "training.json").read_text())
    source, final = Architecture.from_folder(source_folder), Architecture.from_folder(straight / "model")
    assert final.num_parameters <= 0.6 * source.num_parameters
    assert summary["parameters"] == final.num_parameters
    assert set(summary["perplexity"]) == {"source", "after_pruning", "final"}
    assert final.hidden_size % 2 == 0
    assert all(layer.intermediate_size % 2 == 0 for layer in final.layers)
    described = json.loads((straight / "architecture.json").read_text())
    assert Architecture.from_dict(described["final"]) == final
    assert [len(layer) for layer in described["survivors"]["ffn"]] == described["final"]["intermediate_size"]
    logits = load_for_inference(straight / "model")(torch.tensor([[5, 6, 7]])).logits
    assert torch.isfinite(logits).all()
    assert not (straight / "checkpoints").exists()


def test_parameters_fall_step_by_step_and_loss_falls(straight: Path) -> None:
    records = [record for record in metrics(straight) if "loss" in record]
    counts = [record["parameters"] for record in records]
    assert len(records) == 20
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 5
    assert records[-1]["loss"] < records[0]["loss"]
    assert len({unit[0] for record in records for unit in record.get("removed", [])}) > 1  # several group types


def test_log_has_the_scores_of_removed_groups(straight: Path) -> None:
    events = [record for record in metrics(straight) if "removed" in record]
    assert events
    for record in events:
        assert len(record["removed"]) == len(record["scores"]) == len(record["freed"])
        assert min(record["freed"]) > 0
        assert record["cost"] == "parameters"
        assert record["parameters"] <= record["target"]


@pytest.mark.slow
def test_killed_run_resumes_bit_identically(straight: Path, source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    """kill -9 after step 10 (mid-pruning: a checkpoint at 5, one at 10), then --resume."""
    output = tmp_path / "run"
    arguments = command(source_folder, corpus, output)
    process = subprocess.Popen([sys.executable, "-c", SLOW_TRAINING, *arguments], env=os.environ)
    deadline = time.monotonic() + 120
    while not (output / "checkpoints" / "step-00000010").is_dir():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(["--resume", "--output", str(output)]) == 0  # it knows its settings
    expect_same_run(output, straight)
    assert (output / "architecture.json").read_text() == (straight / "architecture.json").read_text()


SLOW_TRAINING = """
import time
from efficientllm.runtime.base.command import run_command
from efficientllm.train import cli
from efficientllm.train.loop import trainer
step = trainer.Trainer._step
def slow(self):
    time.sleep(0.1)
    return step(self)
trainer.Trainer._step = slow
run_command(cli.body)
"""


def test_one_command_starts_and_resumes_a_run_and_leaves_a_finished_one(
    straight: Path, source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    arguments = command(source_folder, corpus, tmp_path, "--resume-or-start")
    run_until(8, arguments)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000005", "step-00000008"]
    assert run(arguments) == 0
    assert metrics(tmp_path) == metrics(straight)
    written = (tmp_path / "model" / "model.safetensors").stat()
    assert run(arguments) == 0
    assert (tmp_path / "model" / "model.safetensors").stat() == written
    capsys.readouterr()
    assert run([*arguments, "--learning-rate", "2e-3"]) == 0
    assert "--learning-rate has changed; the run is finished and stays as it is" in capsys.readouterr().out
    assert run([*arguments, "--seed", "9"]) == 2
    assert "--resume: --seed differ from the run" in capsys.readouterr().err


def test_non_finite_steps_are_skipped_then_end_the_run(
    source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    forward = TrainingLoss.forward
    calls: list[int] = []

    def broken(self: TrainingLoss, *windows: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, entropy = forward(self, *windows, **more)
        calls.extend([1] * self.training)
        is_broken = self.training and (len(calls) == 3 or len(calls) > 7)
        return (total * float("nan"), entropy * float("nan")) if is_broken else (total, entropy)

    monkeypatch.setattr(TrainingLoss, "forward", broken)
    assert run(command(source_folder, corpus, tmp_path / "run")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "for 10 steps in a row" in error
    skipped = [record["step"] for record in metrics(tmp_path / "run") if record.get("skipped")]
    assert skipped == [3, *range(8, 17)]
    last = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert (last / "trainer.json").is_file()


def test_uniform_result_is_a_plain_llama(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    """Without a target nothing is pruned: plain continued pretraining."""
    assert run(unpruned(command(source_folder, corpus, tmp_path / "run", "--preset", "recover"))) == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["model_type"] == "llama"


def test_print_config_round_trips(tmp_path: Path, capsys: ERRORS) -> None:
    assert run(["--preset", "cpu-quickstart", "--tokens", "5k", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "tokens = 5000" in text
    (tmp_path / "config.toml").write_text(text)
    assert run(["--config", str(tmp_path / "config.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text


BAD_INPUT = [
    (["--source", "missing.gguf"], "--source missing.gguf: no such file"),
    (["--target-params", "500"], "is too small: one group per layer already takes"),
    (["--saliency", "Fischer"], "flap, wanda, minitron, token-fisher, random; did you mean fisher?"),
    (["--lr-schedule", "cosin"], "'cosin' is not one of wsd, cosine, constant; did you mean cosine?"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--batch-size", "0"], "--batch-size 0: must be positive"),
    (["--learning-rate", "inf"], "--learning-rate inf: must be above 0 and finite"),
    (["--quantize", "q4_0"], "--quantize q4_0: applies only to --target-bytes; set it"),
    (["--qat-start", "0.5"], "--qat-start 0.5: needs --qat; give a type"),
    (["--teacher", "demo"], "--teacher demo: needs distillation; add --distill 1"),
    (["--teacher", "nowhere", "--distill", "1"], "--teacher nowhere: no such folder, and not a hub id"),
    (["--quantize", "iq4_xs"], "--quantize iq4_xs: --target-bytes supports f32, f16"),
    (["--distill", "-1"], "--distill -1.0: must be at least 0 and finite"),
    (["--removals", "3", "--prune-start", "0.1", "--prune-end", "0.1"], "--removals 3: needs --prune-end after"),
    (["--removals", "3", "--prune-every", "2"], "--removals 3: are evenly spread; omit --prune-every"),
    (["--removals", "300"], "--prune-end (9); use fewer, or give at least --tokens "),
    (["--keep-score", "0.9"], "--keep-score 0.9: needs examples; add --task"),
    (["--task", "nothere.jsonl"], "--task nothere.jsonl: no such file"),
    (["--config", "nothere.toml"], "--config nothere.toml: cannot be read: No such file or directory"),
]


@pytest.mark.parametrize(("more", "message"), BAD_INPUT, ids=[" ".join(more) for more, _ in BAD_INPUT])
def test_bad_input_gives_one_line_and_writes_no_file(
    more: list[str], message: str, source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    arguments = command(source_folder, corpus, tmp_path / "run")
    if any(name.startswith("--target-") for name in more):  # excludes its like
        arguments = without(arguments, "--target-ratio")
    assert run([*arguments, *more]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_target_is_reached_whatever_the_steps_between_removals(
    source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    assert run(command(source_folder, corpus, tmp_path / "run", "--prune-every", "100")) == 0
    (event,) = [record for record in metrics(tmp_path / "run") if record.get("removed")]
    assert event["step"] == 10  # --prune-end 0.5 of 20 steps


def test_resume_works_from_another_folder_and_names_a_changed_corpus(
    source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    monkeypatch.chdir(tmp_path)
    text = Path(shutil.copy(corpus, "text.jsonl"))
    run_until(6, command(source_folder, text, Path("run")))
    text.write_text(text.read_text(encoding="utf-8").replace("a", "b"), encoding="utf-8")
    monkeypatch.chdir(source_folder)
    assert run(["--resume", "--output", os.path.relpath(tmp_path / "run")]) == 0
    assert "--data text.jsonl has changed; the result is not that of" in capsys.readouterr().out


UNHELD = [
    ("qwen3", {"rope_parameters": LLAMA3_ROPE}, ("--for", "onnx,gguf"), "gguf: layer 0 has a llama3 rope"),
    ("gpt_neox", {}, ("--for", "gguf"), "gguf: llama.cpp holds irregular layers of gpt_neox only zero-padded"),
    ("mistral", {"sliding_window": 1}, ("--for", "onnx"), "config.json: sliding_window is 1, a context of one token"),
]


@pytest.mark.parametrize(("family", "settings", "flags", "message"), UNHELD)
def test_a_model_that_a_target_cannot_hold_is_not_trained(
    family: str,
    settings: dict[str, Any],
    flags: tuple[str, ...],
    message: str,
    save_tiny: Callable[..., Path],
    corpus: Path,
    tmp_path: Path,
    capsys: ERRORS,
) -> None:
    source, output = save_tiny(tiny_architecture(family), **settings), tmp_path / "run"
    assert run([*command(source, corpus, output), *flags]) == 2
    assert f"error: --for {message}" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(("busy", "policy"), [(5, None), (60, "passive")])
def test_threads_sleep_while_they_wait_beside_other_programs(
    busy: int, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count only the two cores of the process, one of which is idle, and not core 7."""

    def stat(ticks: int) -> str:
        rows = ["cpu  9 9 9 9 9 9 9 9 9 9", f"cpu0 {ticks} 0 0 {100 - ticks} 0 0 0 0 0 0", "cpu1 0 0 0 100 0 0 0 0 0 0"]
        return "\n".join([*rows, "cpu7 900 0 0 0 0 0 0 0 0 0", "intr 3"])

    texts = iter([stat(0).replace("100", "0"), stat(busy)])
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(Path, "read_text", lambda self: next(texts))
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        cli.set_environment()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_output_in_use_is_kept(
    straight: Path, source_folder: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    output = Path(shutil.copytree(straight, tmp_path / "run"))
    before = (output / "metrics.jsonl").read_text()
    assert run(command(source_folder, corpus, output)) == 2
    assert "is not empty; give --overwrite to replace it or --resume" in capsys.readouterr().err
    assert run(command(source_folder, corpus, output, "--resume", "--seed", "9")) == 2
    assert "--resume: --seed differ from the run" in capsys.readouterr().err
    assert run(["--resume", "--output", str(output), "--seed", "9"]) == 2
    assert "--resume: --seed differ from the run" in capsys.readouterr().err
    assert run(command(source_folder, corpus, output, "--resume")) == 2
    assert "is finished" in capsys.readouterr().err
    assert (output / "metrics.jsonl").read_text() == before


def test_a_run_killed_before_its_settings_were_written_starts_again(
    straight: Path, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / ".config.toml.4711.tmp").write_text("[source]\n")
    assert run(command(source_folder, corpus, output)) == 0
    assert metrics(output) == metrics(straight)
    assert not list(output.glob(".*"))


def test_unsupported_family_names_the_supported_ones(corpus: Path, tmp_path: Path, capsys: ERRORS) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 8}')
    assert run(command(tmp_path, corpus, tmp_path / "run")) == 2
    assert "model type 'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3" in capsys.readouterr().err
