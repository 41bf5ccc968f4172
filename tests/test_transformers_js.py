"""ONNX folders in transformers.js under node, as they are."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exporting import SHAPES, export
from tiny import SIMILAR, tiny_architecture
from transformers import PreTrainedTokenizerFast

from efficientllm.train.evaluation.scoring import is_checkpoint
from efficientllm.train.model.source import load_for_inference

NODE = Path(__file__).parents[1] / "build/node"
SCRIPT = Path(__file__).with_name("transformers_js.mjs")
PROMPT, COUNT = [5, 17, 230, 41, 8, 99, 3], 12


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed (apt install nodejs npm)")
@pytest.mark.skipif(
    not (NODE / "node_modules/@huggingface/transformers").is_dir(),
    reason="transformers.js is missing (npm install --prefix build/node @huggingface/transformers)",
)
@pytest.mark.parametrize("family", SIMILAR)
@pytest.mark.parametrize("shape", ["unequal", "no attention in the first layer", "an empty layer"])
def test_transformers_js_generates_the_tokens_of_torch(
    family: str, shape: str, save_tiny: Callable[..., Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    checkpoint, folder = save_tiny(tiny_architecture(family, SHAPES[shape])), tmp_path / "onnx"
    assert export(checkpoint, "onnx", folder, "--quantize", "f32", "--no-verify") == 0
    done = subprocess.run(
        ["node", str(SCRIPT), str(NODE), str(folder), json.dumps(PROMPT), str(COUNT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["encoded"] == tokenizer.encode("A small model, 2026.")
    held = torch.tensor([PROMPT + answer["tokens"]])
    with torch.inference_mode():
        logits = load_for_inference(checkpoint)(held).logits[0, len(PROMPT) - 1 : -1]
    chosen = logits.gather(1, held[0, len(PROMPT) :, None]).squeeze(1)
    assert len(answer["tokens"]) == COUNT
    assert (chosen > logits.max(1).values - 1e-3).all()  # a near-tie may fall either way


def test_an_onnx_folder_is_no_checkpoint_for_its_config(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_tiny(tiny_architecture())
    assert export(checkpoint, "onnx", tmp_path / "onnx", "--no-verify") == 0
    assert export(checkpoint, "hf-uniform", tmp_path / "uniform", "--no-verify") == 0
    assert (tmp_path / "onnx" / "config.json").is_file()
    assert [is_checkpoint(each) for each in (checkpoint, tmp_path / "uniform", tmp_path / "onnx")] == [
        True,
        True,
        False,
    ]
