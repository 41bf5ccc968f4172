"""What `efficientllm-train` can do beside the plain run of test_train_cli."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIMILAR, tiny_architecture, tiny_model
from training import command, expect_equal_weights, metrics, run, unpruned, weights, without

from efficientllm.export import cli as export_cli
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.train.compute.distributed import Parallel
from efficientllm.train.compute.hardware import Hardware, choose_hardware
from efficientllm.train.compute.trained_model import configure
from efficientllm.train.config.presets import PRESETS
from efficientllm.train.config.pruning import PruneConfig
from efficientllm.train.config.sections import RunConfig, TrainConfig
from efficientllm.train.loop.plan import Compute, _warn_of_compilations
from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.pruning.criteria import CRITERIA, OTHERS, ActivationCriterion
from efficientllm.train.pruning.plan import DroppingSchedule


@pytest.mark.parametrize(
    ("name", "has_amx", "has_bf16", "dtype"),
    [
        ("Intel Xeon", True, True, torch.bfloat16),
        ("Intel Xeon", False, True, torch.float32),
        ("AMD EPYC 9B45", False, True, torch.bfloat16),
        ("AMD EPYC 7B13", False, False, torch.float32),
    ],
)
def test_products_are_in_bf16_where_that_is_faster(
    name: str, has_amx: bool, has_bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    assert choose_hardware("cpu", "auto", 0).dtype == dtype
    assert choose_hardware("cpu", "bfloat16", 0).dtype == torch.bfloat16


def perplexities(folder: Path) -> dict[str, float]:
    return json.loads((folder / "model" / "training.json").read_text())["perplexity"]


def final(folder: Path) -> Architecture:
    return Architecture.from_folder(folder / "model")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), [*((family, True) for family in SIMILAR), ("qwen2", False)])
def test_every_family_trains_and_shrinks(
    family: str, tied: bool, save_tiny: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    source = save_tiny(tiny_architecture(family, (LayerShape(4, 2, 128),) * 2, tied=tied))
    output = tmp_path / "run"
    assert run(command(source, corpus, output, "--tokens", "1280", "--checkpoint-every", "0")) == 0
    assert final(output).num_parameters <= 0.6 * Architecture.from_folder(source).num_parameters
    assert final(output).family == family
    arguments = [str(output), "--target", "gguf", "--quantize", "f32", "--output", str(tmp_path / "gguf")]
    assert run_command(export_cli.body, arguments) == 0  # verified against torch


@pytest.mark.slow
@pytest.mark.parametrize("saliency", sorted({*CRITERIA, *OTHERS} - {PruneConfig.saliency}))
def test_every_criterion_reaches_the_target(saliency: str, source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    more = ["--saliency", saliency, "--gradient-accumulation", "2", "--batch-size", "2"]
    if isinstance(CRITERIA.get(saliency), ActivationCriterion):
        more += ["--prune", "attention,ffn"]
    assert run(command(source_folder, corpus, tmp_path / "run", *more)) == 0
    assert final(tmp_path / "run").num_parameters <= 0.6 * Architecture.from_folder(source_folder).num_parameters


def test_uniform_layout_gives_a_plain_llama(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    assert run(command(source_folder, corpus, tmp_path / "run", "--layout", "uniform", "--prune", "ffn")) == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["intermediate_size"] < 128
    freed = sum(sum(record.get("freed", [])) for record in metrics(tmp_path / "run"))
    source = Architecture.from_folder(source_folder).num_parameters
    assert freed == pytest.approx(source - final(tmp_path / "run").num_parameters)


def test_explicit_architecture_is_reached(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    target = tiny_architecture(
        layers=(LayerShape(2, 2, 100), LayerShape(2, 1, 37), LayerShape(4, 2, 64)), hidden_size=60
    )
    (tmp_path / "target.json").write_text(json.dumps(target.to_dict()))
    arguments = without(command(source_folder, corpus, tmp_path / "run"), "--target-ratio")
    assert run([*arguments, "--target-architecture", str(tmp_path / "target.json")]) == 0
    assert final(tmp_path / "run") == target


@pytest.mark.parametrize("quantize", ["q4_0", "q8_0", "f16"])
def test_target_bytes_equal_those_of_the_exported_file(
    quantize: str, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """The export takes the type in which the run counted."""
    target = {"q4_0": 85_000, "q8_0": 125_000, "f16": 230_000}[quantize]
    arguments = without(command(source_folder, corpus, tmp_path / "run", "--quantize", quantize), "--target-ratio")
    arguments += ["--prune", "attention,ffn", "--width-multiple", "32"]
    assert run([*arguments, "--target-bytes", str(target)]) == 0
    output = str(tmp_path / "gguf")
    export = [str(tmp_path / "run"), "--target", "gguf", "--output", output, "--no-verify"]
    assert run_command(export_cli.body, export) == 0
    assert Manifest.read(tmp_path / "gguf").quantization == quantize
    size = (tmp_path / "gguf" / "model.gguf").stat().st_size
    assert 0.75 * target < size <= target  # units are coarse here


def test_from_scratch_starts_at_chance(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    assert run(unpruned(command(source_folder, corpus, tmp_path / "run", "--init", "random"))) == 0
    assert perplexities(tmp_path / "run")["source"] == pytest.approx(400, rel=0.2)  # the vocabulary's size
    assert perplexities(tmp_path / "run")["final"] < 390


def test_distillation_changes_the_run_and_keeps_the_logged_loss(
    straight: Path, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    assert run(command(source_folder, corpus, tmp_path / "distilled", "--distill", "2.0")) == 0
    assert metrics(straight)[1]["loss"] == metrics(tmp_path / "distilled")[1]["loss"]  # cross-entropy only
    assert metrics(straight)[-1] != metrics(tmp_path / "distilled")[-1]


def test_activation_checkpointing_changes_nothing(
    straight: Path, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    more = ["--checkpoint-every", "0", "--activation-checkpointing"]
    assert run(command(source_folder, corpus, tmp_path / "checkpointed", *more)) == 0
    assert metrics(tmp_path / "checkpointed") == metrics(straight)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_run_removes_the_same_groups(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    more = ["--removals", "2", "--prune", "ffn", "--checkpoint-every", "0"]
    assert run(command(source_folder, corpus, tmp_path / "eager", *more)) == 0
    assert run(command(source_folder, corpus, tmp_path / "compiled", *more, "--compile")) == 0
    assert final(tmp_path / "eager") == final(tmp_path / "compiled")
    for name, tensor in weights(tmp_path / "eager").items():
        torch.testing.assert_close(weights(tmp_path / "compiled")[name], tensor, atol=2e-3, rtol=1e-2)


@pytest.mark.filterwarnings("default")
def test_compilation_leaves_the_mask_to_the_kernel_of_attention() -> None:
    """transformers makes a mask in compiled code, where it cannot see that it needs none."""
    model = tiny_model(tiny_architecture())
    configure(
        model, torch.device("cpu"), activation_checkpointing=False, compiles=True, stores_gradients_as_computed=False
    )
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    assert compiled == list(model.model.layers)
    masks: list[Any] = []
    for layer in compiled:
        layer._compiled_call_impl = lambda states, **options: masks.append(options["attention_mask"]) or states
    model(torch.arange(8)[None])
    assert masks == [None] * len(compiled)


@pytest.mark.usefixtures("drawn_pictures")
def test_run_leaves_its_description(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    assert run(command(source_folder, corpus, tmp_path / "run", "--tensorboard")) == 0
    for name in ("architecture.png", "pruning.png", "model/architecture.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "--target-ratio 0.6" in card
    assert f"| after pruning | {perplexities(tmp_path / 'run')['after_pruning']:.2f} |" in card
    assert f"| 2 | {final(tmp_path / 'run').layers[2].num_attention_heads} |" in card


def test_command_of_the_card_repeats_the_run(
    straight: Path, source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the source and the corpus lie: it names them without their folders."""
    monkeypatch.chdir(tmp_path)
    for path in (source_folder, corpus):
        (tmp_path / path.name).symlink_to(path)
    card = (straight / "model" / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("efficientllm-train"))
    assert run([*shlex.split(line)[1:], "--output", str(tmp_path / "again")]) == 0
    expect_equal_weights(tmp_path / "again", straight)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_configurations(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--preset", name, "--print-config"]) == 0
    assert "[pruning]" in capsys.readouterr().out


def test_bad_architecture_files(
    source_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = without(command(source_folder, corpus, tmp_path / "run"), "--target-ratio")
    path = tmp_path / "target.json"
    for content, message in (
        ("{", "not valid JSON"),
        ("{}", "missing or malformed field"),
        (json.dumps(tiny_architecture(layers=(LayerShape(4, 2, 300),) * 3).to_dict()), "cannot be pruned from"),
    ):
        path.write_text(content)
        assert run([*arguments, "--target-architecture", str(path)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("removals", "sizes"),
    [
        (0, {0: 100, 19: 100, 20: 100, 40: 80, 59: 61, 60: 60, 99: 60}),
        (1, {19: 100, 20: 60, 60: 60}),
        (2, {19: 100, 20: 80, 59: 80, 60: 60}),
        (4, {19: 100, 20: 90, 33: 90, 34: 80, 46: 80, 47: 70, 59: 70, 60: 60}),
    ],
)
def test_the_budget_falls_linearly_or_in_equal_steps(removals: int, sizes: dict[int, float]) -> None:
    schedule = DroppingSchedule(100.0, 60.0, 20, 60, removals)
    assert {tokens: schedule.target_at(tokens) for tokens in sizes} == pytest.approx(sizes)


@pytest.mark.slow
def test_as_many_removals_as_asked_for(
    source_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--prune-start", "0.2", "--prune-end", "0.8", "--removals", "3", "--prune", "ffn", "--target-ratio", "0.8"]
    assert run(command(source_folder, corpus, tmp_path / "run", *more, "--recover", "least-squares")) == 0
    steps = [record for record in metrics(tmp_path / "run") if "loss" in record]
    events = [record["tokens"] / steps[-1]["tokens"] for record in steps if "removed" in record]
    assert events == pytest.approx([0.2, 0.5, 0.8], abs=0.1)
    assert capsys.readouterr().err.count("removal from ") == 3


@pytest.mark.parametrize("name", ["gpu24-1b", "node8-8b"])
def test_gpu_presets_use_the_recommended_recipe(name: str) -> None:
    settings = PRESETS[name]()
    assert 1 < settings.pruning.removals <= 8
    assert (settings.pruning.saliency, settings.pruning.recover) == ("token-fisher", "least-squares")
    assert settings.optimizer.distill == 1.0


@pytest.mark.parametrize(
    ("settings", "warns"),
    [({}, True), ({"removals": 4}, False), ({"prune_every": 20}, False), ({"prune": ("none",)}, False)],
)
def test_many_removals_with_compile_are_warned_of(
    settings: dict[str, Any], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainConfig(pruning=PruneConfig(target_ratio=0.5, **settings), run=RunConfig(compile=True))
    cpu = torch.device("cpu")
    _warn_of_compilations(config, Compute(Hardware(cpu, torch.float32, ""), Parallel("ddp", cpu)))
    assert ("--compile: up to" in caplog.text) == warns


@pytest.mark.slow
@pytest.mark.parametrize(("saliency", "is_of_gradients"), [("taylor1", True), ("token-fisher", True), ("wanda", False)])
def test_groups_are_ranked_by_the_whole_cross_entropy(
    saliency: str, is_of_gradients: bool, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """Until the last of them is gone; distillation alone is what is learned from then on."""
    more = ["--distill", "1", "--prune-start", "0.5", "--prune-end", "0.5", "--checkpoint-every", "0"]
    more += ["--saliency", saliency, "--prune", "attention,ffn", "--target-ratio", "0.8"]
    found = {}
    for weight in ("0", "1"):
        folder = tmp_path / weight
        assert run(command(source_folder, corpus, folder, *more, "--cross-entropy", weight)) == 0
        found[weight] = [record for record in metrics(folder) if "loss" in record]
    (event,) = [place for place, record in enumerate(found["1"]) if "removed" in record]
    assert (found["0"][: event + 1] == found["1"][: event + 1]) == is_of_gradients
    assert found["0"][-1] != found["1"][-1]
