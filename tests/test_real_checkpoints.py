"""Folders as they come from a hub: stored types, shards, and readers of other releases."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import export
from safetensors.torch import load_file, save_file
from stored import STORED, STORED_WAYS, store
from tiny import LLAMA3_ROPE, SIMILAR, UNEQUAL, tiny_architecture, tiny_model
from training import run
from transformers import PreTrainedTokenizerFast

from efficientllm.export.checkpoint import Checkpoint
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.irregular import save_checkpoint
from efficientllm.train.model.source import load_for_inference

THETA = {"rope_type": "default", "rope_theta": 100000.0}
TOKENS = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(3))


Save = Callable[[str, str, int], Path]


@pytest.fixture
def save_stored(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Save:
    """save_stored(family, type, shards) -> folder of a tiny irregular model stored so."""

    def save(family: str, dtype: str, shards: int) -> Path:
        folder = tmp_path / "checkpoint"
        save_checkpoint(tiny_model(tiny_architecture(family)), tokenizer, folder)
        store(folder, STORED[dtype], shards)
        return folder

    return save


every_stored_type = pytest.mark.parametrize(("dtype", "shards"), STORED_WAYS)


@every_stored_type
def test_tensors_are_read_as_they_were_stored(dtype: str, shards: int, save_stored: Save) -> None:
    folder = save_stored("qwen2", dtype, shards)
    expected = load_for_inference(folder).state_dict()
    checkpoint = Checkpoint(folder, "tiny")
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.bias", "model.norm.weight"):
        assert np.array_equal(checkpoint.tensor(name), expected[name].float().numpy())


@every_stored_type
def test_every_stored_type_trains(dtype: str, shards: int, save_stored: Save, corpus: Path, tmp_path: Path) -> None:
    stored = save_stored("qwen2", dtype, shards)
    arguments = ["--source", str(stored), "--data", str(corpus), "--sequence-length", "32", "--tokens", "256"]
    arguments += ["--eval-tokens", "64", "--target-ratio", "0.95", "--dtype", "float32"]
    arguments += ["--output", str(tmp_path / "run")]
    assert run(arguments) == 0


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


# -- readers of other releases


@pytest.mark.parametrize("layers", [(LayerShape(4, 2, 96),) * 2, UNEQUAL], ids=["plain", "irregular"])
@pytest.mark.parametrize("rope", [THETA, LLAMA3_ROPE], ids=["theta", "llama3"])
def test_settings_stand_in_their_old_and_their_new_home(
    layers: tuple[LayerShape, ...], rope: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """In what older releases can read at all: an irregular folder names its settings as its own release does."""
    folder = tmp_path / "checkpoint"
    model = tiny_model(tiny_architecture(layers=layers), rope_parameters=dict(rope))
    save_checkpoint(model, tokenizer, folder)
    assert export(folder, "hf-uniform", tmp_path / "uniform") == 0
    for each in (folder, tmp_path / "uniform"):
        config = json.loads((each / "config.json").read_text())
        assert config["rope_parameters"]["rope_theta"] == rope["rope_theta"]
        if "auto_map" in config:
            assert not {"rope_theta", "rope_scaling", "torch_dtype"} & config.keys()
        else:
            scaled = {name: value for name, value in rope.items() if name != "rope_theta"}
            assert config.get("rope_scaling") == (scaled if rope["rope_type"] != "default" else None)
            assert config["rope_theta"] == rope["rope_theta"]
            assert config["torch_dtype"] == config["dtype"] == "float32"
        with torch.inference_mode():  # and this release reads the same from both
            logits = load_for_inference(each)(TOKENS).logits
            torch.testing.assert_close(logits, model(TOKENS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_tokenizer_needs_no_code_of_this_project(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Nor a question about it, in a process that does not know efficientllm's classes."""
    save_checkpoint(tiny_model(tiny_architecture(), rope_parameters=dict(LLAMA3_ROPE)), tokenizer, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "is_local" not in settings
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        "print(AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False).encode('A small model, 2026.'))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == tokenizer.encode("A small model, 2026.")


# -- caches of layers that have none

KINDS = {
    "whole": LayerShape(4, 2, 96),
    "no attention": LayerShape(0, 0, 64),
    "no FFN": LayerShape(2, 1, 0),
    "nothing": LayerShape(0, 0, 0),
}
SHAPES = [shape for shape in itertools.product(KINDS, repeat=3) if shape.count("no FFN") < 2]
"""Attention absent anywhere, everywhere included."""


def in_steps(model: Any, sizes: list[int], tokens: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """Logits of `tokens` fed in pieces of `sizes`, behind `padding` masked columns; positions only where padded."""
    padded = torch.nn.functional.pad(tokens, (padding, 0))
    mask = (torch.arange(padded.shape[1]) >= padding).long().expand(len(tokens), -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, rows, start = None, [], 0
    for size in sizes:
        end = start + size
        more = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]} if padding else {}
        step = model(padded[:, start:end], cache=cache, use_cache=True, **more)
        assert step.cache.get_seq_length() == end
        cache, start = step.cache, end
        rows.append(step.logits)
    return torch.cat(rows, 1)[:, padding:]


@pytest.mark.slow
@pytest.mark.parametrize("family", SIMILAR)
def test_chunked_padded_and_stepwise_evaluation_agree(family: str) -> None:
    """Wherever attention is absent: positions come from the cache's length, which must not be that of nothing."""
    tokens = TOKENS[:, :12]
    for shape in SHAPES:
        model = tiny_model(tiny_architecture(family, tuple(KINDS[kind] for kind in shape)))
        with torch.inference_mode():
            whole = model(tokens).logits
            for sizes, padding in (([5, 7], 0), ([1] * 12, 0), ([4, 1, 7], 0), ([9, 1, 1, 6], 5)):
                other = in_steps(model, sizes, tokens, padding)
                torch.testing.assert_close(other, whole, atol=1e-4, rtol=1e-4, msg=f"{shape} {sizes}")
