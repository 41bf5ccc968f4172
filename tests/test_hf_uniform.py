"""Zero-padded plain models against the irregular ones they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import export
from safetensors.torch import load_file, save_file
from tiny import SIMILAR, UNEQUAL, tiny_architecture
from transformers import AutoConfig, AutoModelForCausalLM

from efficientllm.train.model.architecture import FAMILIES, LayerShape
from efficientllm.train.model.foreign_configs import ImportOptions
from efficientllm.train.model.importing import import_folder
from efficientllm.train.model.irregular import architecture_of
from efficientllm.train.model.source import load_for_inference

TOKENS = torch.randint(3, 400, (2, 30), generator=torch.Generator().manual_seed(2))

SHAPES = {
    "unequal": UNEQUAL,
    "unequal ratios": (LayerShape(6, 2, 75), LayerShape(3, 3, 40), LayerShape(5, 1, 64)),
    "gaps": (LayerShape(0, 0, 64), LayerShape(4, 2, 0), LayerShape(0, 0, 0), LayerShape(2, 1, 96)),
}


@pytest.mark.parametrize("family", SIMILAR)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hidden_size", [64, 53])
def test_plain_model_gives_the_same_logits(
    family: str, shape: str, hidden_size: int, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = save_tiny(tiny_architecture(family, SHAPES[shape], hidden_size=hidden_size))
    output = tmp_path / "uniform"
    assert export(checkpoint, "hf-uniform", output) == 0
    plain = AutoModelForCausalLM.from_pretrained(output)
    assert type(plain).__name__ == FAMILIES[family].stock_class
    assert type(plain).__module__.startswith("transformers.")
    assert not list(output.glob("*.py"))
    assert not {"per_layer_config", "model_file"} & json.loads((output / "config.json").read_text()).keys()
    with torch.inference_mode():
        difference = (plain.eval()(TOKENS).logits - load_for_inference(checkpoint)(TOKENS).logits).abs().max()
    assert difference < 1e-4


def widths_that_readers_compute(config: Any) -> list[tuple[int, int, int]]:
    """Return (query heads, key/value heads, FFN width) of each layer as vLLM computes them from block_configs."""
    found = []
    for block in config.block_configs:
        groups = 0 if block.attention.no_op else config.num_attention_heads // block.attention.n_heads_in_group
        width = 0
        if not block.ffn.no_op and hasattr(block.ffn, "ffn_mult"):
            width = -(-int(2 * block.ffn.ffn_mult * config.hidden_size / 3) // 256) * 256
        elif not block.ffn.no_op:
            width = block.ffn.intermediate_size
        found.append((config.num_attention_heads if groups else 0, groups, width))
    return found


@pytest.mark.parametrize("shape", [*SHAPES, "wide"])
def test_block_configs_are_read_back_with_the_same_logits(
    shape: str, save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = SHAPES.get(shape, (LayerShape(9, 3, 512), LayerShape(3, 1, 256), LayerShape(0, 0, 768)))
    checkpoint = save_tiny(tiny_architecture("llama", layers, hidden_size=53))
    output = tmp_path / "blocks"
    assert export(checkpoint, "hf", output) == 0
    assert ("TensorRT-LLM does not" in capsys.readouterr().out) == (shape != "wide")
    config = AutoConfig.from_pretrained(output, trust_remote_code=True)
    assert (type(config).__name__, config.model_type) == ("NemotronNasConfig", "nemotron-nas")
    tensors = load_file(output / "model.safetensors")
    read = widths_that_readers_compute(config)
    assert read[0][0]  # vLLM needs an attention in the first layer
    for index, (heads, groups, width) in enumerate(read):
        for name, rows in (("self_attn.q", heads * 32), ("self_attn.k", groups * 32), ("mlp.up", width)):
            tensor = tensors.get(f"model.layers.{index}.{name}_proj.weight")
            assert (0 if tensor is None else len(tensor)) == rows
    imported = import_folder(output, "blocks", ImportOptions()).model
    assert [layer.num_key_value_heads for layer in architecture_of(imported.config).layers] == [g for _, g, _ in read]
    with torch.inference_mode():
        difference = (imported(TOKENS).logits - load_for_inference(checkpoint)(TOKENS).logits).abs().max()
    assert difference < 1e-4
    config.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["block_configs"] == config.block_configs


def test_block_configs_hold_one_family(
    save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(save_tiny(tiny_architecture("qwen3")), "hf", tmp_path / "blocks") == 2
    assert "writes the family llama, not qwen3; use --target hf-uniform" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("target", ["hf-uniform", "gguf", "onnx"])
def test_weights_that_are_no_numbers_are_refused_by_name(
    target: str, value: float, save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An embedding of a token that the sample lacks."""
    checkpoint = save_tiny(tiny_architecture())
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 5] = value
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert export(checkpoint, target, tmp_path / "out", *(() if target == "hf-uniform" else ("--quantize", "f32"))) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert "tensor model.embed_tokens.weight holds NaN or infinite numbers" in error[0]
    assert not (tmp_path / "out").exists()
