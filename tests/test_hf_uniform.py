"""Zero-padded plain models against the irregular ones they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exporting import export
from safetensors.torch import load_file, save_file
from tiny import SIMILAR, UNEQUAL, tiny_architecture
from transformers import AutoModelForCausalLM

from efficientllm.train.model.architecture import FAMILIES, LayerShape
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("target", ["hf-uniform", "gguf", "onnx"])
def test_export_names_the_tensor_with_infinite_weights(
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
