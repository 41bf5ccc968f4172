"""ONNX folders in transformers.js under node, as they are."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import SHAPES, export
from shared_fixtures import Exported
from tiny import SIMILAR, tiny_architecture
from transformers import PreTrainedTokenizerFast

from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.train.evaluation.scoring import is_checkpoint
from efficientllm.train.model.source import load_for_inference

NODE = Path(__file__).parents[1] / "build/node"
SCRIPT = Path(__file__).with_name("transformers_js.mjs")
PROMPT, COUNT = [5, 17, 230, 41, 8, 99, 3], 12


needs_transformers_js = pytest.mark.skipif(
    shutil.which("node") is None or not (NODE / "node_modules/@huggingface/transformers").is_dir(),
    reason="transformers.js is missing (npm install --prefix build/node @huggingface/transformers)",
)


def answered(folder: Path) -> dict[str, Any]:
    """`tokens` that transformers.js generates after PROMPT, a text as `encoded` there and a question as its `chat`."""
    arguments = [str(NODE), str(folder), json.dumps(PROMPT), str(COUNT)]
    done = subprocess.run(["node", str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@needs_transformers_js
@pytest.mark.parametrize(
    ("family", "shape"),
    [
        *((family, "unequal") for family in SIMILAR),
        ("llama", "no attention in the first layer"),
        ("llama", "an empty layer"),
    ],
)
def test_transformers_js_generates_the_tokens_of_torch(
    family: str, shape: str, save_tiny: Callable[..., Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    checkpoint, folder = save_tiny(tiny_architecture(family, SHAPES[shape])), tmp_path / "onnx"
    assert export(checkpoint, "onnx", folder, "--quantize", "f32", "--no-verify") == 0
    answer = answered(folder)
    assert answer["encoded"] == tokenizer.encode("A small model, 2026.")
    question = [{"role": "user", "content": "Hi"}]
    assert answer["chat"] == tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    held = torch.tensor([PROMPT + answer["tokens"]])
    with torch.inference_mode():
        logits = load_for_inference(checkpoint)(held).logits[0, len(PROMPT) - 1 : -1]
    chosen = logits.gather(1, held[0, len(PROMPT) :, None]).squeeze(1)
    assert len(answer["tokens"]) == COUNT
    assert (chosen > logits.max(1).values - 1e-3).all()  # a near-tie may fall either way


@needs_transformers_js
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_transformers_js_generates_the_tokens_of_our_engine(quantize: str, exported: Exported) -> None:
    folder = exported("onnx", "--quantize", quantize)
    engine, held = load_engine(folder, EngineOptions(threads=1, context=64)), list(PROMPT)
    for token in answered(folder)["tokens"]:
        logits = engine.prefill(held)
        assert logits[token] > logits.max() - 0.05  # kernels differ, so a near-tie may fall either way
        held.append(token)
    engine.close()
    assert len(held) == len(PROMPT) + COUNT


def test_config_of_an_onnx_folder_makes_no_checkpoint(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_tiny(tiny_architecture())
    assert export(checkpoint, "onnx", tmp_path / "onnx", "--no-verify") == 0
    assert export(checkpoint, "hf-uniform", tmp_path / "uniform", "--no-verify") == 0
    assert (tmp_path / "onnx" / "config.json").is_file()
    assert [is_checkpoint(each) for each in (checkpoint, tmp_path / "uniform", tmp_path / "onnx")] == [
        True,
        True,
        False,
    ]
