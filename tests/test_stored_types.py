"""The type in which a final model's weights are stored, and that everything of ours reads each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import export
from safetensors.torch import load_file, save_file
from tiny import UNEQUAL, tiny_architecture, tiny_model
from training import command, run, weights

from efficientllm.runtime.base.command import run_command
from efficientllm.train.compute.distributed import Parallel
from efficientllm.train.evaluation import cli as eval_cli
from efficientllm.train.loop.shards import is_without_memory, read_shards
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.foreign_configs import known_shape
from efficientllm.train.model.source import load_source, shape_model, stored_dtype, weights_folder
from efficientllm.train.run import stored_weights

CPU = torch.device("cpu")
SET_WHEN_SAVED = {"architectures": None, "auto_map": None, "model_file": None}
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def copy_in(dtype: torch.dtype, source: Path, folder: Path) -> Path:
    """A copy of a checkpoint with its weights in `dtype`."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": name_of(dtype), "torch_dtype": name_of(dtype)}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=name_of)
def test_a_model_is_stored_in_its_sources_type_and_read_by_every_command(
    dtype: torch.dtype, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    source, output = copy_in(dtype, source_folder, tmp_path / "source"), tmp_path / "run"
    assert run(command(source, corpus, output, "--tokens", "1280", "--checkpoint-every", "0")) == 0
    assert {tensor.dtype for tensor in weights(output).values()} == {dtype}
    config = json.loads((output / "model" / "config.json").read_text())
    assert config["dtype"] == name_of(dtype)
    assert export(output, "gguf", tmp_path / "gguf", "--quantize", "f32") == 0  # verified against torch
    text = tmp_path / "text.txt"
    text.write_text("A small model that was pruned. " * 20)
    arguments = [str(output / "model"), "--tasks", "none", "--text", str(text), "--output", str(tmp_path / "eval")]
    assert run_command(eval_cli.body, arguments) == 0
    again = command(output / "model", corpus, tmp_path / "again", "--tokens", "256", "--checkpoint-every", "0")
    assert run(again) == 0
    assert {tensor.dtype for tensor in weights(tmp_path / "again").values()} == {dtype}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("layers", [UNEQUAL, (LayerShape(2, 2, 64),) * 3], ids=["irregular", "stock"])
def test_a_model_that_is_read_by_rows_is_the_loaded_one(
    family: str, layers: tuple[LayerShape, ...], save_tiny: Callable[..., Path]
) -> None:
    folder = save_tiny(tiny_architecture(family, layers))
    loaded: Any = load_source(str(folder))[0]
    assert weights_folder(str(folder)) == folder
    model = shape_model(folder, "the model")
    assert is_without_memory(model)
    read_shards(model, folder, CPU, Parallel("ddp", CPU))
    ours, theirs = ({**each.config.to_dict(), **SET_WHEN_SAVED} for each in (model, loaded))
    assert ours == theirs
    assert model.generation_config.to_dict() == loaded.generation_config.to_dict()
    tokens = torch.arange(24)[None]
    assert torch.equal(model.eval()(tokens).logits, loaded.eval()(tokens).logits)


def test_another_type_is_the_same_weights_rounded(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    for dtype in TYPES:
        assert run(command(source_folder, corpus, tmp_path / name_of(dtype), "--save-dtype", name_of(dtype))) == 0
    exact = weights(tmp_path / "float32")
    for dtype in TYPES:
        stored = weights(tmp_path / name_of(dtype))
        assert all(torch.equal(stored[name], tensor.to(dtype)) for name, tensor in exact.items())


def test_numbers_beyond_fp16_are_stored_in_fp32(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(tiny_architecture())
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = 1e6
    with caplog.at_level("WARNING", logger="efficientllm.train"):
        stored = stored_weights(model, torch.float16)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert "model.layers.1.mlp.up_proj.weight has numbers beyond float16" in caplog.text


@pytest.mark.parametrize(
    ("quantize", "expected"), [("f32", torch.float32), ("f16", torch.float16), ("q8_0", torch.bfloat16)]
)
def test_a_gguf_source_has_its_own_type_or_bf16(
    quantize: str, expected: torch.dtype, source_folder: Path, tmp_path: Path
) -> None:
    assert export(source_folder, "gguf", tmp_path / "gguf", "--quantize", quantize, "--no-verify") == 0
    assert stored_dtype(str(tmp_path / "gguf" / "model.gguf")) == expected


def test_a_shape_is_known_before_the_weights_are_read(source_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((source_folder / "config.json").read_text())
    shape = known_shape(str(tmp_path))
    assert shape is not None
    assert len(shape[0].layers) == 3
    assert known_shape("owner/name") is None
    (tmp_path / "config.json").write_text("{}")
    assert known_shape(str(tmp_path)) is None
