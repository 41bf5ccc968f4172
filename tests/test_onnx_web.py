"""ONNX folders in onnxruntime-web, the engine of browsers, under node."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_architecture

from efficientllm.export import cli
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.engines.engine import EngineOptions, load_engine

PACKAGE = Path(__file__).parents[1] / "build/node/node_modules/onnxruntime-web"
SCRIPT = Path(__file__).with_name("ort_web.mjs")
PROMPT, COUNT = [5, 17, 230, 41, 8, 99, 3], 12
pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed (apt install nodejs npm)"),
    pytest.mark.skipif(
        not PACKAGE.is_dir(), reason="onnxruntime-web is missing (npm install --prefix build/node onnxruntime-web)"
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["f32", "web", "int8", "int4"])
def test_web_gives_the_engines_tokens(quantize: str, save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    command = [str(save_tiny(tiny_architecture())), "--target", "onnx", "--quantize", quantize]
    assert run_command(cli.body, [*command, "--output", str(folder)]) == 0
    web = subprocess.run(
        ["node", str(SCRIPT), str(PACKAGE.parent.parent), str(folder), json.dumps(PROMPT), str(COUNT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert web.returncode == 0, web.stderr
    tokens = json.loads(web.stdout)["tokens"]
    engine = load_engine(folder, EngineOptions(threads=1, context=64))
    held = list(PROMPT)
    for token in tokens:  # teacher-forced: kernels differ, so a near-tie may fall either way, a wrong graph may not
        logits = engine.prefill(held)
        assert logits[token] > logits.max() - (1e-3 if quantize == "f32" else 0.05)
        held.append(token)
    engine.close()
    assert np.unique(tokens).size > 1
