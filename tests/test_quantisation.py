"""Training on the grid of the file that ships: grids to the bit, the run around them, and the files it ends in."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from exporting import export
from shared import made_once
from tiny import tiny_architecture, tiny_model
from training import command, expect_same_run, metrics, run, run_until, weights, without

from efficientllm.export.group_quantization import quantize_groups, round_to_bfloat16
from efficientllm.runtime.base.gguf_header import read_header
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.train.config.sections import QuantisationConfig
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.families import FAMILIES
from efficientllm.train.model.tensors import EMBEDDING, HEAD
from efficientllm.train.quantisation.grids import GRIDS
from efficientllm.train.quantisation.weights import InputSquares, RoundedWeights

WEIGHT = torch.randn(96, 192, generator=torch.Generator().manual_seed(0)) * 0.05
WEIGHT[0, :32] = 0  # an empty block
WEIGHT[1, :2] = torch.tensor([0.3, -0.3])  # two largest weights
WEIGHT[2] = WEIGHT[2].bfloat16().float()


def of_llama_cpp(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What llama.cpp's own code makes of a matrix: quantised and read back."""
    (library,) = (Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so")
    base = ctypes.CDLL(str(library))
    number, block, size = {"q4_0": (2, 32, 18), "q8_0": (8, 32, 34)}[kind]
    array = np.ascontiguousarray(weight.numpy())
    data = np.empty(array.size // block * size, np.uint8)
    floats = ctypes.POINTER(ctypes.c_float)
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    base.ggml_quantize_chunk(number, array.ctypes.data_as(floats), data.ctypes.data, 0, *array.shape, None)
    return read_by_llama_cpp(data, kind, array.shape)


def read_by_llama_cpp(data: np.ndarray, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    (library,) = (Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so")
    read = getattr(ctypes.CDLL(str(library)), f"dequantize_row_{kind}")
    floats = ctypes.POINTER(ctypes.c_float)
    read.argtypes = [ctypes.c_void_p, floats, ctypes.c_int64]
    back = np.empty(shape, np.float32)
    read(np.ascontiguousarray(data).ctypes.data, back.ctypes.data_as(floats), back.size)
    return torch.from_numpy(back)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_a_grid_equals_that_of_llama_cpp_to_the_bit(kind: str) -> None:
    rounded = GRIDS[kind].round(WEIGHT)
    assert torch.equal(rounded, of_llama_cpp(WEIGHT, kind))
    by_gguf = gguf.quants.quantize(WEIGHT.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    again = gguf.quants.dequantize(by_gguf, gguf.GGMLQuantizationType[kind.upper()])
    assert np.abs(rounded.numpy() - again).max() < 1e-4  # its own rounding of ties
    assert torch.equal(of_llama_cpp(rounded, kind), rounded)  # the exporter's quantiser keeps it


@pytest.mark.parametrize(
    ("kind", "bits", "group", "options"),
    [("int4", 4, 32, {"signed": True}), ("int4-bf16", 4, 32, {"rounding": round_to_bfloat16}), ("int8", 8, 192, {})],
)
def test_the_other_exporters_keep_their_grids(kind: str, bits: int, group: int, options: dict[str, Any]) -> None:
    rounded = GRIDS[kind].round(WEIGHT).numpy()
    codes, scales = quantize_groups(rounded, bits, group, **options)
    assert np.array_equal(codes * np.repeat(scales, group, axis=1), rounded)
    gram = WEIGHT.numpy().T @ WEIGHT.numpy()
    codes, scales = quantize_groups(rounded, bits, group, gram, **options)  # --calibrate finds nothing to make up for
    assert np.array_equal(codes * np.repeat(scales, group, axis=1), rounded)


def test_rows_that_blocks_do_not_divide_are_rounded_as_if_padded() -> None:
    rounded = GRIDS["q4_0"].round(WEIGHT[:, :75])
    padded = torch.nn.functional.pad(WEIGHT[:, :75], (0, 21))
    assert torch.equal(rounded, GRIDS["q4_0"].round(padded)[:, :75])


def test_gradients_equal_those_of_the_rounded_weights() -> None:
    model = tiny_model(tiny_architecture())
    tokens = torch.randint(3, 400, (2, 16))
    rounded = RoundedWeights(QuantisationConfig(qat="q8_0"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with rounded.applied(model):
        model(tokens, labels=tokens).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    model.zero_grad()
    rounded.make_permanent(model)
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name
        assert (parameter.dim() == 2) == (not torch.equal(before[name], parameter)), name


def test_scales_of_q4_0_follow_the_inputs_of_columns() -> None:
    """Less weighted error, on a grid that llama.cpp's quantiser finds again."""
    importance = torch.rand(WEIGHT.shape[1], generator=torch.Generator().manual_seed(1)) ** 8
    grid = GRIDS["q4_0"]
    plain, heeding = grid.round(WEIGHT), grid.round(WEIGHT, importance)
    errors = [float(((rounded - WEIGHT).square() * importance).sum()) for rounded in (plain, heeding)]
    assert errors[1] < 0.9 * errors[0]
    assert torch.equal(of_llama_cpp(heeding, "q4_0"), heeding)
    assert torch.equal(grid.round(heeding, importance), heeding)
    assert torch.equal(grid.round(heeding), heeding)
    assert torch.equal(GRIDS["q8_0"].round(WEIGHT, importance), GRIDS["q8_0"].round(WEIGHT))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_every_family_has_its_inputs(family: str) -> None:
    model = tiny_model(tiny_architecture(family)).train()
    inputs = InputSquares()
    with inputs.observing(model):
        model(torch.randint(3, 400, (2, 16)))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name != EMBEDDING:
            assert inputs.of(name, parameter.shape[1]) is not None, name
    assert inputs.of(HEAD, model.config.hidden_size) is not None


@pytest.mark.parametrize("tied", [True, False])
def test_scales_of_a_tied_embedding_follow_the_inputs_of_the_head(tied: bool) -> None:
    model = tiny_model(replace(tiny_architecture(), tie_word_embeddings=tied)).train()
    rounded = RoundedWeights(QuantisationConfig(qat="q4_0"))
    with rounded.applied(model):
        model(torch.randint(3, 400, (2, 16)))
    weight = model.get_parameter(EMBEDDING).detach()
    importance = rounded.inputs.of(HEAD, weight.shape[1])
    plain, heeding = GRIDS["q4_0"].round(weight), GRIDS["q4_0"].round(weight, importance)
    assert not torch.equal(plain, heeding)
    with rounded.applied(model):
        assert torch.equal(model.get_parameter(EMBEDDING), heeding if tied else plain)


def test_inputs_are_watched_in_training_alone() -> None:
    model = tiny_model(tiny_architecture()).train()
    seen: dict[str, torch.Tensor] = {}
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].detach()}))
    inputs, tokens = InputSquares(), torch.randint(3, 400, (2, 16))
    with inputs.observing(model):
        model(tokens)
    means = {name: values.flatten(0, -2).square().mean(0) for name, values in seen.items()}
    for parameter, name in (
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj"),
        ("model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.q_proj"),
    ):
        torch.testing.assert_close(inputs.of(parameter, len(means[name])), means[name])
    assert inputs.of("model.layers.1.mlp.down_proj.weight", 5) is None  # it was pruned since
    assert inputs.of(HEAD, model.config.hidden_size) is not None
    first = {name: mean.clone() for name, mean in inputs.state_dict().items()}
    with inputs.observing(model.eval()):
        model(tokens)

    def failing() -> None:
        with inputs.observing(model.train()):
            model(tokens)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert all(torch.equal(first[name], mean) for name, mean in inputs.state_dict().items())
    with inputs.observing(model):
        model(torch.full((2, 16), 7))
    changed = [name for name, mean in inputs.state_dict().items() if not torch.equal(first[name], mean)]
    assert len(changed) == len(first) == 4 * model.config.num_hidden_layers + 1


def test_failure_within_a_step_restores_unrounded_weights() -> None:
    model = tiny_model(tiny_architecture())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt), RoundedWeights(QuantisationConfig(qat="8da4w")).applied(model):
        raise KeyboardInterrupt
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_activations_of_8da4w_are_torchaos() -> None:
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    from efficientllm.train.quantisation.weights import round_to_int8

    config = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    values = torch.cat([WEIGHT[4:48], WEIGHT[48:].abs()])
    ours, theirs = round_to_int8(values), IntxFakeQuantizer(config)(values)
    assert (ours - theirs).abs().max() < 1e-6


QAT = ("--qat", "q4_0", "--qat-start", "0.25", "--distill", "1", "--stem-channels", "52")


@pytest.fixture(scope="module")
def trained(source_folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that prunes heads, FFN and stem, to a given width, while it trains for q4_0."""

    def make(folder: Path) -> None:
        assert run(command(source_folder, corpus, folder / "run", *QAT)) == 0

    return made_once(tmp_path_factory, "qat", make) / "run"


def test_a_run_prunes_and_ends_on_the_grid(trained: Path) -> None:
    assert json.loads((trained / "model" / "training.json").read_text())["quantisation"]["type"] == "q4_0"
    final = weights(trained)
    assert final[EMBEDDING].shape[1] == 52
    removed = [{kind for kind, *_ in record["removed"]} for record in metrics(trained) if record.get("removed")]
    assert ["stem" in kinds for kinds in removed] == [True] + [False] * (len(removed) - 1)
    widths = [weight.shape[1] for name, weight in final.items() if "down_proj" in name]
    assert max(widths) < 128
    assert any(width % 32 for width in widths)
    for name, weight in final.items():
        if weight.dim() == 2:
            assert torch.equal(GRIDS["q4_0"].round(weight), weight), name


def test_a_resumed_run_is_the_same_to_the_bit(trained: Path, source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = command(source_folder, corpus, tmp_path / "run", *QAT)
    run_until(12, arguments)
    assert run([*arguments, "--resume"]) == 0
    expect_same_run(tmp_path / "run", trained)


def test_the_file_is_the_trained_grid_to_the_bit(trained: Path, tmp_path: Path) -> None:
    assert export(trained, "gguf", tmp_path / "out", "--calibrate", "demo") == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.quantization == "q4_0"
    assert any("to the bit" in note for note in manifest.notes)
    assert any("--calibrate changes nothing" in note for note in manifest.notes)
    assert manifest.verification["quantized"]["mean_kl"] < 1e-3  # activations in llama.cpp's products are int8
    stored = read_header(tmp_path / "out" / "model.gguf").tensors
    assert {tensor.kind for tensor in stored if len(tensor.shape) == 2} == {2}


def test_export_names_a_type_of_another_grid(trained: Path, tmp_path: Path) -> None:
    assert export(trained, "gguf", tmp_path / "out", "--quantize", "q5_0") == 0
    notes = Manifest.read(tmp_path / "out").notes
    assert any("trained for q4_0, q5_0 is another grid: --quantize q4_0" in note for note in notes)


def test_a_checkpoint_that_was_changed_after_training_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    changed = tmp_path / "changed"
    changed.mkdir()
    for file in (trained / "model").iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    tensors = weights(trained)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 0.01
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert export(changed, "gguf", tmp_path / "out") == 2
    assert "blk.0.ffn_up.weight is not on that grid" in capsys.readouterr().err


def test_wrong_types_give_one_line(source_folder: Path, corpus: Path, tmp_path: Path, capsys: Any) -> None:
    for flags, message in (
        (("--qat", "q4_k"), "q4_k"),
        (("--qat", "q4_0", "--save-dtype", "bfloat16"), "--save-dtype bfloat16: the grid of --qat q4_0 needs float32"),
        (("--qat", "int4-block32", "--qat-head", "q8_0"), "--qat-head q8_0: needs --qat"),
        (("--qat", "q4_0", "--qat-start", "1"), "--qat-start 1"),
    ):
        assert run(command(source_folder, corpus, tmp_path / "run", *flags)) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert message in errors[-1]


def test_onnx_keeps_the_grid_of_int4_block32(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = without(command(source_folder, corpus, tmp_path / "run", "--qat", "int4-block32"), "--tokens")
    assert run([*arguments, "--tokens", "640"]) == 0
    assert export(tmp_path / "run", "onnx", tmp_path / "out") == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.quantization == "int4"
    assert manifest.verification["quantized"]["mean_kl"] < 1e-3  # its kernels round activations to int8


@pytest.mark.parametrize("family", ["gpt_neox", "olmo2"])
def test_training_on_a_grid_refuses_families_with_changed_weights(
    family: str, save_tiny: Callable[..., Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny(tiny_architecture(family, (LayerShape(4, 4, 128),) * 2, head_dim=16))
    assert run(command(source, corpus, tmp_path / "run", "--qat", "q4_0")) == 2
    assert f"--qat q4_0: a GGUF of {family} stores rescaled weights" in capsys.readouterr().err
