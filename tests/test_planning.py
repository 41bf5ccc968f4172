"""`efficientllm-plan` on made-up devices."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from priced import tiny_profile, tiny_time
from tiny import tiny_architecture

from efficientllm.runtime.base.command import run_command
from efficientllm.train.cli import build_parser, configuration
from efficientllm.train.config.presets import preset
from efficientllm.train.config.pruning import LatencyTarget
from efficientllm.train.config.sections import TrainConfig
from efficientllm.train.memory import estimate_memory
from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.model.groups import KINDS
from efficientllm.train.planning import cli
from efficientllm.train.planning.gpus import CARDS, command, plan_gpus
from efficientllm.train.planning.targets import candidates, meaning
from efficientllm.train.pruning.selection import SelectionRules

SOURCE = tiny_architecture(layers=(LayerShape(4, 2, 512),) * 3)

LLAMA_1B = Architecture("llama", 2048, 64, 128_256, True, (LayerShape(32, 8, 8192),) * 16)
LLAMA_8B = Architecture("llama", 4096, 128, 128_256, False, (LayerShape(32, 8, 14_336),) * 32)


@pytest.fixture
def profiles(tmp_path: Path) -> list[Path]:
    """Two devices, the second named otherwise."""
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    first = tiny_profile()
    first.save(paths[0])
    replace(first, measured_on=replace(first.measured_on, device="board")).save(paths[1])
    return paths


def test_the_plan_says_what_goes_with_what(
    profiles: list[Path], source_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(source_folder), "--target", "0.9x,0.8x"]
    for path in profiles:
        arguments += ["--device-profile", str(path)]
    assert run_command(cli.body, arguments) == 0
    shown = capsys.readouterr().out
    assert "| what goes | parameters | local ms | local us per M | board ms | board us per M |" in shown
    assert "error on 3 irregular models at depth 0: median 2.0%, worst 5.0%" in shown
    source, time = Architecture.from_folder(source_folder), tiny_time()
    saved = time.measure.of(source) - time.measure.of(source.with_layer(1, intermediate_size=0))
    assert re.search(rf"\| the FFN of a layer \| 24\.6k \| {saved:.3f} \|", shown)
    assert shown.count("| 0.8x |") == 2


def test_a_candidate_is_worth_the_mean_over_the_layers_that_have_it() -> None:
    source = tiny_architecture(layers=(LayerShape(4, 2, 512), LayerShape(0, 0, 512), LayerShape(2, 1, 512)))
    found = {candidate.title: candidate for candidate in candidates(source)}
    assert len(found["the attention of a layer"].remaining) == 2
    assert found["a key/value group of every layer"].parameters(source) == 2 * 64 * 32 * 2 * 1 + 64 * 32 * 2
    everywhere = found["256 FFN channels of every layer"].remaining[0]
    assert [layer.intermediate_size for layer in everywhere.layers] == [256] * 3


def test_what_saves_most_per_parameter_leaves_most_parameters() -> None:
    rules = SelectionRules(("kv_group", "query_head", "ffn"), 32)
    found = meaning(SOURCE, tiny_time(), LatencyTarget.parse("0.7x"), rules)
    assert tiny_time().measure.of(found.largest) <= found.ms
    assert found.equal is not None
    assert found.equal.is_uniform
    assert found.largest.num_parameters >= found.equal.num_parameters
    assert all(KINDS["ffn"].count(found.largest, layer) == 512 for layer in range(3))  # heads are the better bargain


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "name a profile of a device with --device-profile, or a --gpu"),
        (["--target", "8"], "--target 8: give a share"),
        (["--workload", "words=3"], "cannot read 'words=3'"),
        (["--target", "0.001x"], "too small: one group per layer already takes"),
        (["--gpu", "h100"], "--device-profile and --gpu are different plans"),
        (["--gpu", "h100", "--gpus", "12"], "--gpus 12: give at most 8, or a multiple of 8"),
    ],
)
def test_bad_requests_are_one_line(
    more: list[str], message: str, profiles: list[Path], source_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--device-profile", str(profiles[0])] if more and "--gpus" not in more else []
    assert run_command(cli.body, [str(source_folder), *given, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


# -- a run on GPUs


def test_a_run_on_gpus_is_planned_from_shapes_and_data_sheets(
    source_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(source_folder), "--gpu", "a100", "--gpus", "8", "--tokens", "10M", "--target-ratio", "0.6"]
    assert run_command(cli.body, arguments) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    figures = [line for line in table if line.startswith("| ")][1:]
    assert len(figures) == 8
    assert all(line.endswith(" | derived |") for line in figures[1:])
    launcher, _, flags = last.partition(" -m efficientllm.train.cli ")
    assert launcher == "torchrun --nproc-per-node 8"
    assert parsed(flags).pruning.target_ratio == 0.6


def parsed(flags: str) -> TrainConfig:
    """The configuration of a command's flags."""
    values = build_parser().parse(shlex.split(flags))
    del values["print_config"]
    return configuration(values)


def test_the_printed_command_is_the_plan() -> None:
    plan = plan_gpus("llama", LLAMA_1B, "4090", 1, 10**9, 0.5)
    name, _, flags = command(plan.config, 1).partition(" ")
    assert name == "efficientllm-train"
    assert parsed(flags) == plan.config
    assert "--nnodes 3 --nproc-per-node 8 " in command(plan.config, 24)


def test_a_model_is_sharded_and_rounded_only_where_it_must_be() -> None:
    chosen = {}
    for gpu, gpus, shape in (("h100", 1, LLAMA_1B), ("4090", 1, LLAMA_1B), ("h100", 8, LLAMA_8B)):
        config = plan_gpus("llama", shape, gpu, gpus, 10**9, 0.5).config
        chosen[gpu, gpus] = config.run.data_parallel, config.optimizer.optimizer_dtype
    assert chosen == {
        ("h100", 1): ("ddp", "float32"),
        ("4090", 1): ("ddp", "bfloat16"),
        ("h100", 8): ("fsdp", "float32"),
    }


def test_hours_are_those_of_the_arithmetic() -> None:
    """6 FLOP for a parameter and token of the model, 2 for the teacher's: the table of docs/scale.md."""
    plan = plan_gpus("llama", LLAMA_1B, "h100", 1, 10**10, 0.5)
    mean = 0.125 + 0.875 * 0.5  # removals lie around an eighth of the tokens
    scores = 2 * 2048 * 2048 * 16
    flop = (6 * LLAMA_1B.num_parameters + 3 * scores) * mean + 2 * LLAMA_1B.num_parameters + scores
    assert not plan.config.run.activation_checkpointing
    assert plan.expected_tokens_per_second == pytest.approx(0.4 * 989e12 / flop, rel=1e-3)
    assert plan.expected_tokens_per_second < plan.tokens_per_second < 989e12 / flop


def test_a_model_that_does_not_fit_is_one_line_with_what_fits(
    source_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "source_shape", lambda source: LLAMA_8B)
    assert run_command(cli.body, ["owner/llama", "--gpu", "4090"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    found = re.fullmatch(
        r"error: --gpu 4090 --gpus 1: a rank of owner/llama takes .* of 24\.0 GB \(derived\); it fits on (.*)", error
    )
    assert found is not None
    for name, gpu in (each.split(" x ") for each in found[1].split(" or ")):
        assert plan_gpus("llama", LLAMA_8B, gpu, int(name), 10**9, 0.5).memory.peak <= CARDS[gpu].memory


@pytest.mark.parametrize(
    ("name", "shape", "ranks", "gpu"), [("gpu24-1b", LLAMA_1B, 1, "4090"), ("node8-8b", LLAMA_8B, 8, "h100")]
)
def test_gpu_presets_fit(name: str, shape: Architecture, ranks: int, gpu: str) -> None:
    estimate = estimate_memory(preset(name), shape, torch.bfloat16, ranks, is_on_gpu=True, fuses=True)
    assert estimate.peak <= CARDS[gpu].memory
