"""Irregular folders in mlx-lm, as saved and quantised by it. `make mlx` installs mlx's CPU build."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import EVERY_KIND
from pruning import some_removal
from safetensors.numpy import load_file
from test_stock_runtimes import MLX
from tiny import LLAMA3_ROPE, tiny_architecture, tiny_model
from transformers import PreTrainedTokenizerFast

from efficientllm.train.model.architecture import FAMILIES
from efficientllm.train.model.irregular import architecture_of, save_checkpoint
from efficientllm.train.model.source import load_for_inference
from efficientllm.train.pruning.surgery import remove_groups

READER = Path(__file__).parent / "tools" / "other_reader.py"
TOKENS = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(3))
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
WINDOWS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 16}, "qwen2": QWEN_WINDOW, "qwen3": QWEN_WINDOW}
"""Settings with a window that is shorter than TOKENS."""
LARGEST = 1e-4
"""Largest difference between logits in fp32, which are sums of the same numbers in another order."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("mlx"),
    pytest.mark.skipif(not MLX.is_file(), reason="mlx-lm is not installed (make mlx)"),
]


def run(home: Path, *command: object) -> None:
    """Run mlx-lm's Python, which has no torch."""
    done = subprocess.run(
        [MLX, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def read(root: Path) -> None:
    """Write logits.npy into every folder of `root`: two chunks, then token by token, with mlx-lm's caches."""
    np.save(root / "tokens.npy", TOKENS.numpy())
    run(root, READER, root)


def difference(folder: Path, reference: Path) -> float:
    """Return the largest difference between mlx-lm's logits of a folder and torch's of another."""
    with torch.inference_mode():
        expected = load_for_inference(reference)(TOKENS).logits.numpy()
    return float(np.abs(np.load(folder / "logits.npy") - expected).max())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folders of all families with layers of every kind, and their logits. The untied ones have a pruned stem."""
    folder = tmp_path_factory.mktemp("mlx")
    for family in FAMILIES:
        for head in ("tied", "untied"):
            architecture = tiny_architecture(family, EVERY_KIND, tied=head == "tied")
            model = tiny_model(architecture, **WINDOWS.get(family, {}))
            if head == "untied":  # its norms and embeddings have scales that no stock class has
                remove_groups(model, some_removal(architecture_of(model.config), ("stem",), units=2))
            save_checkpoint(model, tokenizer, folder / f"{family}-{head}")
    model = tiny_model(tiny_architecture("llama", EVERY_KIND * 3))
    save_checkpoint(model, tokenizer, folder / "many-layers")
    assert '"02": {' in (folder / "many-layers" / "config.json").read_text()  # numbers of two digits
    model = tiny_model(tiny_architecture(), rope_parameters=dict(LLAMA3_ROPE))
    save_checkpoint(model, tokenizer, folder / "llama3")
    config = (folder / "llama3" / "config.json").read_text()
    shutil.copytree(folder / "llama3", folder / "yarn")
    (folder / "yarn" / "config.json").write_text(config.replace('"rope_type": "llama3"', '"rope_type": "yarn"'))
    read(folder)
    return folder


@pytest.mark.parametrize(
    "name", [*(f"{family}-{head}" for family in FAMILIES for head in ("tied", "untied")), "many-layers", "llama3"]
)
def test_mlx_lm_gives_our_logits(name: str, root: Path) -> None:
    assert difference(root / name, root / name) < LARGEST


def test_mlx_lm_refuses_a_rope_that_is_not_compared(root: Path) -> None:
    refusal = (root / "yarn" / "refusal.txt").read_text()
    assert refusal == "rope_type 'yarn' is not supported in mlx-lm; use transformers"


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_lm_quantises_irregular_folders(bits: int, root: Path, tmp_path: Path) -> None:
    """With the very codes, which mlx-lm dequantises and torch reads."""
    quantized, dequantized = tmp_path / "quantized", tmp_path / "dequantized"
    convert = (tmp_path, "-m", "mlx_lm", "convert", "--trust-remote-code")
    run(
        *convert,
        "--hf-path",
        root / "qwen3-tied",
        "--mlx-path",
        quantized,
        "-q",
        "--q-bits",
        bits,
        "--q-group-size",
        32,
    )
    run(*convert, "--hf-path", quantized, "--mlx-path", dequantized, "-d")
    generate = (tmp_path, "-m", "mlx_lm", "generate", "--trust-remote-code")
    run(*generate, "--model", quantized, "--prompt", "A", "--max-tokens", 3)
    codes = {name for name, tensor in load_file(quantized / "model.safetensors").items() if tensor.dtype == np.uint32}
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"} <= codes
    assert "model.layers.1.mlp.down_proj.weight" not in codes  # 75 channels are no multiple of the group
    read(tmp_path)
    assert difference(quantized, dequantized) < LARGEST
    assert difference(quantized, root / "qwen3-tied") > LARGEST
