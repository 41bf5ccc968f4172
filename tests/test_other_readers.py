"""Our folders in other releases of transformers and in mlx-lm: `make readers` installs them, each in its own venv."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import SHAPES, export
from tiny import LLAMA3_ROPE, SIMILAR, tiny_architecture, tiny_model
from transformers import PreTrainedTokenizerFast

from efficientllm.train.model.irregular import save_checkpoint
from efficientllm.train.model.source import load_for_inference

READERS = [Path(each) for each in os.environ.get("EFFICIENTLLM_READERS", "").split(os.pathsep) if each]
"""Pythons with something that reads Hugging Face folders."""
TOKENS = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(3))
ROPES = {"theta": {"rope_type": "default", "rope_theta": 100000.0}, "llama3": LLAMA3_ROPE}
CASES = [
    (family, rope, shape)
    for family in SIMILAR
    for rope in ROPES
    for shape in ("unequal", "no attention in the first layer", "an empty layer")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder and its uniform form of every case, with the tokens to read."""
    root = tmp_path_factory.mktemp("folders")
    np.save(root / "tokens.npy", TOKENS.numpy())
    for number, (family, rope, shape) in enumerate(CASES):
        model = tiny_model(tiny_architecture(family, SHAPES[shape]), rope_parameters=dict(ROPES[rope]))
        save_checkpoint(model, tokenizer, root / f"{number}-irregular")
        assert export(root / f"{number}-irregular", "hf-uniform", root / f"{number}-uniform") == 0
    return root


@pytest.mark.slow
@pytest.mark.skipif(not READERS, reason="EFFICIENTLLM_READERS names no Python to read with (make readers)")
@pytest.mark.parametrize("python", READERS, ids=lambda python: python.parent.parent.name)
def test_other_readers_give_our_logits(python: Path, folders: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(folders, tmp_path / "folders"))
    script = Path(__file__).parent / "tools" / "other_reader.py"
    subprocess.run([python, script, root], check=True, env={"PATH": "", "HOME": str(tmp_path)})
    reader, version = (root / "reader.txt").read_text().split()
    irregular_fits = reader == "mlx-lm" or tuple(map(int, version.split(".")[:2])) >= (5, 14)
    for number, case in enumerate(CASES):
        with torch.inference_mode():
            expected = load_for_inference(folders / f"{number}-irregular")(TOKENS).logits.numpy()
        uniform = np.load(root / f"{number}-uniform" / "logits.npy")
        assert np.abs(uniform - expected).max() < 1e-3, case
        if irregular_fits:
            irregular = np.load(root / f"{number}-irregular" / "logits.npy")
            assert np.abs(irregular - expected).max() < 1e-3, case
        else:
            refusal = (root / f"{number}-irregular" / "refusal.txt").read_text()
            assert "need transformers 5.14 or newer" in refusal, case
