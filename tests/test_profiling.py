"""efficientllm-bench --profile: stacks are taken apart into the table that they came from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from latency import HEAD_DIM, MEASURED_ON, true_ms
from priced import tiny_profile, tiny_time
from tiny import tiny_architecture

from efficientllm.devices import cli, profiler
from efficientllm.devices.profiler import error_of
from efficientllm.devices.profiling import random_models
from efficientllm.devices.profiling.random_models import write_checkpoint
from efficientllm.devices.profiling.random_shapes import (
    SMOLLM2_135M,
    Design,
    irregular_shapes,
    neighbours,
    source_shape,
)
from efficientllm.devices.profiling.regression import FEATURES, assemble, features
from efficientllm.export import cli as export_cli
from efficientllm.export.checkpoint import Checkpoint
from efficientllm.runtime.base.child import ProcessResult
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError, install_command
from efficientllm.runtime.latency.profile import DeviceProfile
from efficientllm.runtime.latency.shape import DecoderShape, LayerShape, Workload
from efficientllm.runtime.latency.table import is_odd, missed

SMALL = DecoderShape(64, 32, 1024, (LayerShape(4, 2, 128),) * 3)
UNEQUAL = DecoderShape(
    64, 32, 600, (LayerShape(4, 2, 96), LayerShape(0, 0, 64), LayerShape(1, 1, 0), LayerShape(0, 0, 0))
)


@pytest.mark.parametrize("build", [Design.full, Design.thin])
def test_fit_finds_the_costs_of_the_parts_of_stacks(build: Callable[[DecoderShape], Design]) -> None:
    design = build(replace(SMOLLM2_135M, layers=SMOLLM2_135M.layers[:12]))
    depths, prompts = (0, 512), (1, 32)
    measured = {
        stack: np.array([*(true_ms(stack, depth) for depth in depths), *(true_ms(stack, 0) * n for n in prompts)])
        for stack in design.stacks()
    }
    table = assemble(design, depths, prompts, measured)
    profile = DeviceProfile(MEASURED_ON, table)
    for shape in irregular_shapes(design.source, 20, seed=1):
        for depth in (0, 300, 512):
            assert profile.decode_ms(shape, depth) == pytest.approx(true_ms(shape, depth))
        assert profile.prefill_ms(shape, 32) == pytest.approx(32 * true_ms(shape, 0))


def test_shapes_of_a_source_of_one_layer_have_one_layer() -> None:
    one = DecoderShape(128, 32, 512, (LayerShape(4, 2, 256),))
    assert {len(shape.layers) for shape in irregular_shapes(one, 20)} == {1}


def test_a_feature_of_another_name_is_refused() -> None:
    row = features(attention=1, heads=3)
    assert dict(zip(FEATURES, row, strict=True)) == dict.fromkeys(FEATURES, 0.0) | {"attention": 1.0, "heads": 3.0}
    with pytest.raises(ValueError, match="head: not among the features token, attention"):
        features(attention=1, head=3)


def test_a_profile_without_scipy_names_its_extra_before_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert run_command(cli.body, ["--profile", str(tmp_path / "profile.json")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "scipy" in error
    assert install_command("bench") in error
    assert not list(tmp_path.iterdir())


def test_noise_of_single_models_hardly_reaches_the_table() -> None:
    """Every model is off by a few per cent, and some by half."""
    design, random = Design.full(SMOLLM2_135M), np.random.default_rng(3)

    def measured(shape: DecoderShape) -> np.ndarray:
        disturbed = 1.5 if random.random() < 0.08 else 1.0
        return np.array([true_ms(shape, 0) * disturbed * (1 + 0.02 * random.standard_normal())] * 2)

    models = [*design.stacks(), *irregular_shapes(design.source, 10, seed=1_000)]
    profile = DeviceProfile(MEASURED_ON, assemble(design, (0,), (1,), {shape: measured(shape) for shape in models}))
    unseen = irregular_shapes(design.source, 20)
    predicted = [profile.decode_ms(shape, 0) for shape in unseen]
    assert error_of(0, [true_ms(shape, 0) for shape in unseen], predicted).worst < 0.05


def test_a_step_of_a_kernel_is_in_the_table() -> None:
    """FFNs of one width take longer than a line through the others says."""
    design = Design.full(SMOLLM2_135M)
    stacks = {stack: np.array([true_ms(stack, 0)] * 2) for stack in design.stacks()}
    width = design.ffn_widths[3]
    stepped = design.stack(576, design.ffn(width))
    stacks[stepped] = stacks[stepped] * 1.03
    profile = DeviceProfile(MEASURED_ON, assemble(design, (0,), (1,), stacks))
    step = (
        profile.ffn_ms(design.ffn(width), 576, Workload.at_depth(0)) - 3e-7 * 576 * width - 0.02
    ) * design.num_top_layers
    assert step == pytest.approx(0.03 / 1.03 * stacks[stepped][0], rel=0.2)


def test_table_has_the_cost_of_a_layer_without_ffn() -> None:
    design = Design.full(SMOLLM2_135M)

    def ms(shape: DecoderShape) -> float:
        return true_ms(shape, 0) + 0.007 * sum(not layer.intermediate_size for layer in shape.present_layers)

    table = assemble(design, (0,), (1,), {stack: np.array([ms(stack)] * 2) for stack in design.stacks()})
    shape = DecoderShape(448, HEAD_DIM, 4096, (LayerShape(6, 3, 0), LayerShape(9, 3, 512)))
    assert DeviceProfile(MEASURED_ON, table).decode_ms(shape, 0) == pytest.approx(ms(shape))


def test_weights_beyond_the_cache_cost_more(tmp_path: Path) -> None:
    """Small models find all of their weights in a cache of 15 million, large ones none."""
    design = Design.full(SMOLLM2_135M)

    def ms(shape: DecoderShape) -> np.ndarray:
        beyond = 4e-8 * shape.num_weights * missed(shape.num_weights, 15e6)
        return np.array([true_ms(shape, 0) + beyond, 32 * true_ms(shape, 0)])

    models = [*design.stacks(), *irregular_shapes(design.source, 10, seed=1_000), *neighbours(design.source)]
    table = assemble(design, (0,), (32,), {shape: ms(shape) for shape in models})
    assert table.surcharge is not None
    assert table.surcharge.capacity[0] == pytest.approx(15e6, rel=0.3)
    assert table.surcharge.spill_ms == pytest.approx([0.04, 0], rel=0.2, abs=1e-6)  # a prompt reads them once for all
    DeviceProfile(MEASURED_ON, table).save(tmp_path / "profile.json")
    profile = DeviceProfile.load(tmp_path / "profile.json")
    for shape in irregular_shapes(design.source, 20):
        assert profile.decode_ms(shape, 0) == pytest.approx(ms(shape)[0], rel=0.04)
        assert profile.prefill_ms(shape, 32) == pytest.approx(ms(shape)[1], rel=1e-3)


def test_rows_beside_the_stride_of_a_kernel_cost_more() -> None:
    """Kernels that take 64 weights at a time finish the last 32 of odd rows singly; no grid of widths says so."""
    design = Design.full(SMOLLM2_135M)

    def ms(shape: DecoderShape) -> np.ndarray:
        rows = shape.vocab_size * is_odd(shape.hidden_size)
        for layer in shape.present_layers:
            reading = 64 * (layer.num_attention_heads + 2 * layer.num_key_value_heads) + 2 * layer.intermediate_size
            rows += reading * is_odd(shape.hidden_size) + shape.hidden_size * is_odd(layer.intermediate_size)
        return np.array([true_ms(shape, 0) + 8e-6 * rows] * 2)

    models = [*design.stacks(), *irregular_shapes(design.source, 10, seed=1_000), *neighbours(design.source)]
    profile = DeviceProfile(MEASURED_ON, assemble(design, (0,), (1,), {shape: ms(shape) for shape in models}))
    for shape in irregular_shapes(design.source, 20):
        assert profile.decode_ms(shape, 0) == pytest.approx(ms(shape)[0], rel=1e-3)
    even, odd = (replace(neighbours(design.source)[0], hidden_size=hidden) for hidden in (512, 544))
    assert profile.decode_ms(odd, 0) - profile.decode_ms(even, 0) > 2 * (true_ms(odd, 0) - true_ms(even, 0))


@pytest.mark.parametrize(
    "surcharge",
    [
        {"capacity": [0, 0], "spill_ms": [1, 1], "odd_ms": [0, 0]},
        {"capacity": [1], "spill_ms": [1], "odd_ms": [0]},
        {"capacity": [1, 1], "spill_ms": [1, -1], "odd_ms": [0, 0]},
        {"capacity": [1, 1], "spill_ms": [1, 1]},
    ],
)
def test_a_damaged_surcharge_is_refused(surcharge: dict[str, list[float]], tmp_path: Path) -> None:
    design = Design.full(SMALL)
    table = assemble(design, (0,), (1,), {stack: np.array([true_ms(stack, 0)] * 2) for stack in design.stacks()})
    DeviceProfile(MEASURED_ON, table).save(tmp_path / "profile.json")
    values = json.loads((tmp_path / "profile.json").read_text())
    values["table"]["surcharge"] = surcharge
    (tmp_path / "profile.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match="is damaged"):
        DeviceProfile.load(tmp_path / "profile.json")


def test_neighbours_of_the_source_lack_much_of_one_part() -> None:
    source, *others = neighbours(SMOLLM2_135M)
    assert source == DecoderShape(576, 64, 49152, (LayerShape(9, 3, 1536),) * 30)
    assert len(set(others)) == 6
    assert not set(others) & set(irregular_shapes(SMOLLM2_135M, 20))
    assert all(shape.num_weights < 0.95 * source.num_weights for shape in others)
    assert neighbours(replace(SMOLLM2_135M, layers=(LayerShape(1, 1, 1536),)))[0].layers


def test_poor_table_gives_a_warning() -> None:
    error = error_of(512, [1.0, 2.0, 4.0], [1.1, 2.0, 3.0])
    assert (error.depth, error.models) == (512, 3)
    assert error.median == pytest.approx(0.1)
    assert error.worst == pytest.approx(0.25)
    assert error.r2 == pytest.approx(1 - 1.01 / (14 / 3))


def test_held_out_models_are_irregular_and_within_the_source() -> None:
    shapes = irregular_shapes(SMOLLM2_135M, 20)
    assert shapes == irregular_shapes(SMOLLM2_135M, 20)
    assert not set(shapes) & set(Design.full(SMOLLM2_135M).stacks())
    layers = [layer for shape in shapes for layer in shape.layers]
    assert {layer.num_key_value_heads for layer in layers} == {0, 1, 2, 3}
    assert {layer.intermediate_size % 256 for layer in layers} == set(range(0, 256, 32))
    assert max(shape.hidden_size for shape in shapes) <= 576
    assert any(not layer.intermediate_size for layer in layers)


def test_random_checkpoints_are_models_of_their_shape(tmp_path: Path) -> None:
    write_checkpoint(UNEQUAL, tmp_path, 128)
    checkpoint = Checkpoint(tmp_path, "random")
    architecture = checkpoint.architecture
    assert (architecture.hidden_size, architecture.head_dim, architecture.vocab_size) == (64, 32, 600)
    widths = [
        (each.num_attention_heads, each.num_key_value_heads, each.intermediate_size) for each in architecture.layers
    ]
    assert widths == [(4, 2, 96), (0, 0, 64), (1, 1, 0)]  # what lost everything is left out
    first, second = (checkpoint.tensor(f"model.layers.{i}.mlp.down_proj.weight")[:, :64] for i in (0, 1))
    assert np.std(first) == pytest.approx(0.02, rel=0.05)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1  # equal matrices would be stored once


def test_widths_of_a_source_are_read_from_its_folder(source_folder: Path, tmp_path: Path) -> None:
    assert source_shape(str(source_folder)) == DecoderShape(64, 32, 400, (LayerShape(4, 2, 128),) * 3)
    options = ["--profile", str(tmp_path / "p.json"), "--profile-like", str(tmp_path)]
    assert run_command(cli.body, options) == 2


def test_bench_prints_the_predictions_of_a_profile(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tiny_profile()
    measured = tmp_path / "run.json"
    quick = ["--prompt-tokens", "16", "--decode-tokens", "8", "--depths", "32", "--rounds", "1", "--repetitions", "1"]
    files = ["--json", str(measured), "--predict", str(tmp_path / "profile.json")]
    command = [str(artefact), *quick, "--threads", "1", *files]
    profile.save(tmp_path / "profile.json")
    assert run_command(cli.body, command) == 2
    assert "the device profile was measured with quantization q4_0, not f32" in capsys.readouterr().err
    assert not measured.exists()
    same = replace(profile.measured_on, quantization="f32", engine_settings="", kv_cache="f16")
    replace(profile, measured_on=same).save(tmp_path / "profile.json")
    assert run_command(cli.body, command) == 0
    assert json.loads(measured.read_text())["options"]["kv_cache"] == "f16"
    lines = capsys.readouterr().out.splitlines()
    tests = {line.split()[1]: float(line.split()[2]) for line in lines if line.split()[1:2] in (["pp16"], ["tg8"])}
    shape = tiny_architecture()
    priced = tiny_time(replace(profile, measured_on=same), Workload.at_depth(4)).measure.of(shape)
    assert tests["tg8"] == pytest.approx(priced, abs=1e-3)
    assert tests["pp16"] > 0
    assert run_command(cli.body, [*command[:-1], str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["llama.cpp", "onnxruntime"])
def test_profile_of_this_machine_predicts_its_measurements(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def few_stacks(source: DecoderShape) -> Design:
        return replace(Design.thin(source), neighbours=neighbours(source) if engine == "llama.cpp" else ())

    monkeypatch.setattr(profiler, "SMOLLM2_135M", SMALL)
    monkeypatch.setitem(profiler.DESIGNS, engine, few_stacks)
    monkeypatch.setattr(profiler, "NUM_FITTED_IRREGULAR", 3)
    monkeypatch.setattr(random_models, "PARALLEL_EXPORTS", 1)
    run_python, programs = random_models.run_python, []

    def export_here(*arguments: str) -> ProcessResult:
        """Export the first model as a program, as all are exported elsewhere, and the others without its imports."""
        programs.append(arguments)
        if len(programs) == 1:
            return run_python(*arguments)
        return ProcessResult(run_command(export_cli.body, arguments[3:]), "", "")

    monkeypatch.setattr(random_models, "run_python", export_here)
    file = tmp_path / "profile.json"
    command = ["--profile", str(file), "--profile-engine", engine, "--rounds", "1", "--threads", "1"]
    assert run_command(cli.body, [*command, "--profile-held-out", "2", "--profile-name", "a stand-in"]) == 0
    printed = capsys.readouterr().out
    assert "error on 2 held-out models, decoding at depth 512: median" in printed
    profile = DeviceProfile.load(file)
    profile.check(engine=engine, quantization={"llama.cpp": "q4_0"}.get(engine, "int4"), threads=1)
    assert profile.measured_on.device == "a stand-in"
    assert profile.measured_on.clock == "cpu"
    assert [error.depth for error in profile.errors] == [0, 512]
    assert profile.decode_ms(SMALL, 512) > profile.decode_ms(SMALL, 0) > 0
    stacks = json.loads((tmp_path / "profile.bench.json").read_text())["results"]
    models = {*few_stacks(SMALL).stacks(), *irregular_shapes(SMALL, 2), *few_stacks(SMALL).neighbours}
    assert len(stacks) > len(models)  # and those that the table was made to agree with
