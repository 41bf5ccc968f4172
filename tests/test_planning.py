"""`efficientllm-plan` on made-up devices."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from priced import tiny_profile, tiny_time
from tiny import tiny_architecture

from efficientllm.runtime.base.command import run_command
from efficientllm.train.config.presets import preset
from efficientllm.train.config.pruning import LatencyTarget
from efficientllm.train.memory import estimate_memory
from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.model.groups import KINDS
from efficientllm.train.planning import cli
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
        ([], "name a profile of a device with --device-profile"),
        (["--target", "8"], "--target 8: give a share"),
        (["--workload", "words=3"], "cannot read 'words=3'"),
        (["--target", "0.001x"], "too small: one group per layer already takes"),
    ],
)
def test_bad_requests_are_one_line(
    more: list[str], message: str, profiles: list[Path], source_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--device-profile", str(profiles[0])] if more else []
    assert run_command(cli.body, [str(source_folder), *given, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


@pytest.mark.parametrize(
    ("name", "shape", "ranks", "memory"), [("gpu24-1b", LLAMA_1B, 1, 24e9), ("node8-8b", LLAMA_8B, 8, 80e9)]
)
def test_gpu_presets_fit(name: str, shape: Architecture, ranks: int, memory: float) -> None:
    estimate = estimate_memory(preset(name), shape, torch.bfloat16, ranks, is_on_gpu=True, fuses=True)
    assert estimate.peak <= memory
