"""A .litertlm in stock LiteRT-LM, which `make litert` installs in build/litert: it wants older releases than we do."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tiny_architecture

import efficientllm.export
from efficientllm.train.model.architecture import LayerShape

PYTHON = Path(os.environ.get("EFFICIENTLLM_LITERT") or Path(__file__).parents[1] / "build/litert/bin/python")
PACKAGE = Path(efficientllm.export.__file__).parents[2]

LAYERS = (LayerShape(4, 2, 96), LayerShape(0, 0, 64), LayerShape(2, 1, 0))
"""Own heads and widths everywhere, a layer without attention and one without FFN."""

EXPORT = "from efficientllm.export.cli import main; main()"
UNMASKED = "from efficientllm.export.litert import exporter; exporter.MASKED = 0.0; "
"""The program then sees slots of the caches that hold nothing yet."""
OTHER_CODES = """
from ai_edge_litert.interpreter import Interpreter
get_tensor = Interpreter.get_tensor
Interpreter.get_tensor = lambda self, *place: get_tensor(self, *place) + 1
"""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("litert")]


def export(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`efficientllm-export` of this tree in the environment that has LiteRT."""
    if not PYTHON.is_file():
        pytest.skip("LiteRT is not installed; make litert installs it")
    command = [str(PYTHON), "-c", code, *map(str, arguments), "--target", "litert", "--max-context", "256"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=500, env=environment, stdin=subprocess.DEVNULL
    )


def test_litert_lm_runs_an_irregular_model(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Logits of the program, and the greedy text of LiteRT-LM, which the export itself compares. (In fp32:
    test_stock_runtimes.py.)"""
    checkpoint, output = save_tiny(tiny_architecture(layers=LAYERS)), tmp_path / "litert"
    done = export(EXPORT, checkpoint, "--quantize", "int8", "--output", output)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    assert {path.name for path in output.iterdir()} == {"manifest.json", "model.litertlm"}
    assert (manifest["engine"], manifest["quantization"]) == ("litert-lm", "int8")
    assert manifest["verification"]["quantized"]["mean_kl"] < 0.05
    assert manifest["verification"]["codes"]["weights"] == "codes of the program, by LiteRT"
    assert manifest["verification"]["litert_lm"]["same_characters"] > 0


def test_a_program_with_other_codes_is_refused(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Every code is one higher than the nearest."""
    checkpoint, output = save_tiny(tiny_architecture(layers=LAYERS[:1])), tmp_path / "litert"
    done = export(OTHER_CODES + EXPORT, checkpoint, "--quantize", "int8", "--output", output)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "is none of the checkpoint's, rounded to the nearest codes" in done.stderr
    assert not output.exists()


def test_a_program_that_is_not_the_checkpoint_s_function_is_refused(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint, output = save_tiny(tiny_architecture(layers=LAYERS[:1])), tmp_path / "litert"
    done = export(UNMASKED + EXPORT, checkpoint, "--quantize", "f32", "--output", output)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "litert: the fp32 file's logits differ from torch's" in done.stderr
    assert not output.exists()
