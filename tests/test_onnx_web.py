"""ONNX folders in onnxruntime-web, the engine of browsers, under node and with WebGPU in Chromium."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from chromium import CHROMIUM, chromium
from exporting import export
from tiny import UNEQUAL, tiny_architecture

from efficientllm.runtime.engines.engine import EngineOptions, load_engine

PACKAGE = Path(__file__).parents[1] / "build/node/node_modules/onnxruntime-web"
SCRIPT = Path(__file__).with_name("ort_web.mjs")
PROMPT, COUNT = [5, 17, 230, 41, 8, 99, 3], 12
PATIENCE_MS = 300_000
QUANTIZED = {"f32": 1e-3, "int8": 0.05, "int4": 0.05}
"""Type -> largest distance of a token from the largest logit."""
WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
"""Chromium's own WebGPU without a GPU."""

needs_package = pytest.mark.skipif(
    not PACKAGE.is_dir(), reason="onnxruntime-web is missing (npm install --prefix build/node onnxruntime-web)"
)
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed (apt install nodejs npm)")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
pytestmark = [pytest.mark.slow, needs_package]


def check_tokens(folder: Path, tokens: list[int], tolerance: float) -> None:
    """Require tokens of the largest logit, up to `tolerance`, because kernels round in other ways."""
    engine = load_engine(folder, EngineOptions(threads=1, context=64))
    held = list(PROMPT)
    for token in tokens:
        logits = engine.prefill(held)
        assert logits[token] > logits.max() - tolerance
        held.append(token)
    engine.close()
    assert np.unique(tokens).size > 1


@needs_node
@pytest.mark.parametrize("quantize", ["f32", "web", "int8", "int4"])
def test_web_gives_the_engines_tokens(quantize: str, save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    assert export(save_tiny(tiny_architecture()), "onnx", folder, "--quantize", quantize) == 0
    web = subprocess.run(
        ["node", str(SCRIPT), str(PACKAGE.parent.parent), str(folder), json.dumps(PROMPT), str(COUNT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert web.returncode == 0, web.stderr
    check_tokens(folder, json.loads(web.stdout)["tokens"], 1e-3 if quantize == "f32" else 0.05)


@needs_chromium
def test_webgpu_gives_the_engines_tokens(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    checkpoint = save_tiny(tiny_architecture(layers=UNEQUAL))
    for quantize in QUANTIZED:
        assert export(checkpoint, "onnx", tmp_path / quantize, "--quantize", quantize) == 0
    folders = {"runtime": PACKAGE / "dist", "tests": SCRIPT.parent, **{name: tmp_path / name for name in QUANTIZED}}

    def answer(route: Any) -> None:
        _, folder, name = urlsplit(route.request.url).path.split("/")
        route.fulfill(path=folders[folder] / name)

    with chromium(*WEBGPU) as browser:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.route("**/*", answer)
        page.goto("http://localhost/tests/ort_webgpu.html")
        found = {name: page.evaluate("each => greedy(each)", [f"/{name}", PROMPT, COUNT]) for name in QUANTIZED}
    for name, tokens in found.items():
        assert tokens is not None, "Chromium has no WebGPU"
        check_tokens(tmp_path / name, tokens, QUANTIZED[name])
