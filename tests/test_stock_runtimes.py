"""One irregular checkpoint in every stock runtime that holds it: the likeliest next token at 512 positions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import figures
import onnx
import pytest
import torch
from exporting import export
from test_onnx_web import PACKAGE, SCRIPT
from tiny import tiny_architecture, tiny_model
from tools.stock_runtime import RUNTIMES
from transformers import PreTrainedTokenizerFast

from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.irregular import save_checkpoint
from efficientllm.train.model.source import load_for_inference

TOOL = Path(__file__).parent / "tools" / "stock_runtime.py"
MLX = Path(__file__).parents[1] / "build/readers/mlx-lm/bin/python"
WEB = "onnxruntime-web"
WINDOWS = torch.randint(3, 400, (2, 256), generator=torch.Generator().manual_seed(5))
LEAST = 0.995
"""Share of positions where a runtime's likeliest token is torch's."""

TARGETS = {
    "llama.cpp": ("gguf", "--quantize", "f32"),
    "llama.cpp, another build": ("gguf", "--quantize", "f32"),
    "onnxruntime": ("onnx", "--quantize", "f32"),
    "onnxruntime-genai": ("onnx", "--quantize", "f32"),
    "OpenVINO": ("onnx", "--quantize", "f32"),
    WEB: ("onnx", "--quantize", "f32"),
    "ExecuTorch": ("executorch", "--quantize", "f32", "--max-context", "256"),
    "transformers": ("checkpoint",),
    "mlx-lm": ("checkpoint",),
}
"""Runtime -> the target it reads, and its flags: fp32 throughout."""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stock runtimes")]


LAYERS = (LayerShape(4, 2, 96), LayerShape(0, 0, 64), LayerShape(2, 1, 0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The checkpoint; artefacts come beside it."""
    folder = tmp_path_factory.mktemp("runtimes")
    save_checkpoint(tiny_model(tiny_architecture(layers=LAYERS)), tokenizer, folder / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def expected(root: Path) -> torch.Tensor:
    """The likeliest next tokens [B, S]."""
    with torch.inference_mode():
        return load_for_inference(root / "checkpoint")(WINDOWS).logits.argmax(-1)


def python_of(runtime: str) -> str:
    """The Python that has it; skips where there is none."""
    if runtime == "mlx-lm":
        if not MLX.is_file():
            pytest.skip("mlx-lm is not installed (make mlx)")
        return str(MLX)
    package = RUNTIMES[runtime][0]
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    return sys.executable


@pytest.mark.parametrize("runtime", TARGETS)
def test_the_likeliest_tokens_equal_those_of_torch(
    runtime: str, root: Path, expected: torch.Tensor, record_property: Callable[[str, object], None]
) -> None:
    if runtime == WEB:
        if shutil.which("node") is None or not PACKAGE.is_dir():
            pytest.skip("node or onnxruntime-web is missing (npm install --prefix build/node onnxruntime-web)")
        commands = [
            ["node", str(SCRIPT), str(PACKAGE.parent.parent), str(artefact_of(runtime, root)), json.dumps(window), "0"]
            for window in WINDOWS.tolist()
        ]
    else:
        command = [python_of(runtime), str(TOOL), runtime, str(artefact_of(runtime, root))]
        commands = [[*command, json.dumps(WINDOWS.tolist())]]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(root / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    answers = []
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    if runtime == WEB:
        found = torch.tensor([answer["tokens"] for answer in answers])
        name = f"{WEB} {answers[0]['version']}"
    else:
        found, name = torch.tensor(answers[0]["next"]), answers[0]["runtime"]
    share = (found == expected).double().mean().item()
    record_property(figures.PROPERTY, f"{name}: {100 * share:.2f} % of {expected.numel()} positions as torch")
    assert share >= LEAST


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_openvino_reads_the_codes_as_onnxruntime_does(quantize: str, root: Path) -> None:
    folder = root / f"onnx-{quantize}"
    assert export(root / "checkpoint", "onnx", folder, "--quantize", quantize) == 0
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # activations stay fp32, as in OpenVINO without dynamic quantisation
    onnx.save(model, folder / "model.onnx")
    found = {}
    for runtime in ("onnxruntime", "OpenVINO"):
        command = [python_of(runtime), str(TOOL), runtime, str(folder), json.dumps(WINDOWS.tolist())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found[runtime] = torch.tensor(json.loads(done.stdout.splitlines()[-1])["next"])
    assert (found["onnxruntime"] == found["OpenVINO"]).double().mean() >= LEAST


def artefact_of(runtime: str, root: Path) -> Path:
    """What the runtime reads of the checkpoint, exported the first time."""
    target, *flags = TARGETS[runtime]
    folder = root / target
    if not folder.exists():
        assert export(root / "checkpoint", target, folder, *flags) == 0
    return folder
