"""Folders as they come from a hub: stored types, shards, and readers of other releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import export
from safetensors.torch import load_file, save_file
from tiny import LLAMA3_ROPE, UNEQUAL, tiny_architecture, tiny_model
from training import run
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from efficientllm.export.checkpoint import Checkpoint
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.irregular import save_checkpoint
from efficientllm.train.model.source import load_for_inference

STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
THETA = {"rope_type": "default", "rope_theta": 100000.0}
TOKENS = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(3))


def store(folder: Path, dtype: torch.dtype, shards: int) -> None:
    """Rewrite a folder's weights in `dtype`, in as many files, with an index as transformers writes it."""
    single = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(single).items()}
    single.unlink()
    config = json.loads((folder / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config | {"dtype": name, "torch_dtype": name}))
    if shards == 1:
        save_file(tensors, single, metadata={"format": "pt"})
        return
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(params=[(name, shards) for name in STORED for shards in (1, 2)], ids=lambda p: f"{p[0]}x{p[1]}")
def stored(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    name, shards = request.param
    folder = tmp_path / "checkpoint"
    save_checkpoint(tiny_model(tiny_architecture("qwen2")), tokenizer, folder)
    store(folder, STORED[name], shards)
    return folder


def test_tensors_are_read_as_they_were_stored(stored: Path) -> None:
    expected = load_for_inference(stored).state_dict()
    checkpoint = Checkpoint(stored, "tiny")
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.bias", "model.norm.weight"):
        assert np.array_equal(checkpoint.tensor(name), expected[name].float().numpy())


@pytest.mark.parametrize("target", ["gguf", "onnx", "hf-uniform"])
def test_every_stored_type_exports(stored: Path, target: str, tmp_path: Path) -> None:
    quantize = [] if target == "hf-uniform" else ["--quantize", "f32"]
    assert export(stored, target, tmp_path / target, *quantize) == 0


@pytest.mark.slow
def test_every_stored_type_exports_to_executorch(stored: Path, tmp_path: Path) -> None:
    assert export(stored, "executorch", tmp_path / "pte", "--quantize", "f32", "--max-context", "32") == 0


def test_every_stored_type_trains(stored: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = ["--source", str(stored), "--data", str(corpus), "--sequence-length", "32", "--tokens", "256"]
    arguments += ["--eval-tokens", "64", "--target-ratio", "0.95", "--dtype", "float32"]
    arguments += ["--output", str(tmp_path / "run")]
    assert run(arguments) == 0


# -- readers of other releases


@pytest.mark.parametrize("layers", [(LayerShape(4, 2, 96),) * 2, UNEQUAL], ids=["plain", "irregular"])
@pytest.mark.parametrize("rope", [THETA, LLAMA3_ROPE], ids=["theta", "llama3"])
def test_settings_stand_in_their_old_and_their_new_home(
    layers: tuple[LayerShape, ...], rope: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "checkpoint"
    model = tiny_model(tiny_architecture(layers=layers), rope_parameters=dict(rope))
    save_checkpoint(model, tokenizer, folder)
    assert export(folder, "hf-uniform", tmp_path / "uniform") == 0
    for each in (folder, tmp_path / "uniform"):
        config = json.loads((each / "config.json").read_text())
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == rope["rope_theta"]
        assert config["torch_dtype"] == config["dtype"] == "float32"
        scaled = {name: value for name, value in rope.items() if name != "rope_theta"}
        assert config.get("rope_scaling") == (scaled if rope["rope_type"] != "default" else None)
        with torch.inference_mode():  # and this release reads the same from both
            logits = load_for_inference(each)(TOKENS).logits
            torch.testing.assert_close(logits, model(TOKENS).logits, atol=1e-4, rtol=1e-4)
        settings = json.loads((each / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "is_local" not in settings
        reread = AutoTokenizer.from_pretrained(each, trust_remote_code=True)
        assert reread.encode("A small model, 2026.") == tokenizer.encode("A small model, 2026.")


# -- caches of layers that have none

ATTENTION = {True: LayerShape(4, 2, 96), False: LayerShape(0, 0, 96)}


@pytest.mark.parametrize("present", [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)])
def test_whole_chunked_padded_and_stepwise_evaluation_agree(present: tuple[bool, bool, bool]) -> None:
    """Wherever attention is absent: positions come from the cache's length, which must not be that of nothing."""
    model = tiny_model(tiny_architecture(layers=tuple(ATTENTION[each] for each in present)))
    with torch.inference_mode():
        whole = model(TOKENS).logits
        first = model(TOKENS[:, :9], use_cache=True)
        second = model(TOKENS[:, 9:], cache=first.cache, use_cache=True)
        chunked = torch.cat([first.logits, second.logits], 1)
        cache, steps = None, []
        for position in range(TOKENS.shape[1]):
            step = model(TOKENS[:, position : position + 1], cache=cache, use_cache=True)
            cache = step.cache
            steps.append(step.logits)
        padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), TOKENS], 1)
        mask = (torch.arange(padded.shape[1]) >= 5).long().expand(2, -1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        begun = model(padded[:, :20], attention_mask=mask[:, :20], position_ids=positions[:, :20], use_cache=True)
        ended = model(padded[:, 20:], attention_mask=mask, position_ids=positions[:, 20:], cache=begun.cache)
        left_padded = torch.cat([begun.logits[:, 5:], ended.logits], 1)
    for other in (chunked, torch.cat(steps, 1), left_padded):
        torch.testing.assert_close(other, whole, atol=1e-4, rtol=1e-4)
