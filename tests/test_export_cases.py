"""Generated models in stock engines against transformers; tests/tools/export_cases.py runs any number of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import export_cases
import numpy as np
import pytest

from efficientllm.export.gguf import exporter, writer
from efficientllm.export.onnx import exporter as onnx_exporter
from efficientllm.export.onnx.graph_values import GraphValues
from efficientllm.train.model.architecture import LayerShape

SEED = 1
FAST = {"gguf": 4, "onnx": 12, "executorch": 0}
CASES = {"gguf": 12, "onnx": 48, "executorch": 1}
"""Target -> its cases (CASES), and those that are not marked slow."""
REFUSALS = ("cannot store; choose onnx", "no rotary embedding in every fourth layer")
"""Parts of the messages about models that llama.cpp's architectures cannot hold."""


@pytest.mark.parametrize(
    ("target", "index"),
    [
        pytest.param(target, index, marks=[pytest.mark.slow] if index >= FAST[target] else [])
        for target, count in CASES.items()
        for index in range(count)
    ],
)
def test_a_generated_model_is_right_or_refused_with_its_cause(target: str, index: int, tmp_path: Path) -> None:
    if target == "executorch":
        pytest.importorskip(target, reason=f"{target} is not installed")
    logging.getLogger("efficientllm").setLevel(logging.ERROR)
    outcome = export_cases.run_case(target, export_cases.generate(target, SEED, index), tmp_path)
    is_expected = outcome.kind == "refused" and target == "gguf" and any(text in outcome.detail for text in REFUSALS)
    assert outcome.kind == "right" or is_expected, f"{export_cases.command(target, SEED, index)}: {outcome}"


def test_a_smollm3_without_attention_is_refused_with_its_cause(tmp_path: Path) -> None:
    outcome = export_cases.run_case("gguf", export_cases.generate("gguf", 2, 195), tmp_path)
    assert outcome.kind == "refused"
    assert "gguf: no layer has attention" in outcome.detail


def test_the_comparer_knows_that_centred_embeddings_are_rounded(tmp_path: Path) -> None:
    """An OLMo with q8_0 matrices and an embedding in q4_0."""
    outcome = export_cases.run_case("gguf", export_cases.generate("gguf", 2, 375), tmp_path)
    assert outcome.kind == "right", outcome


@pytest.mark.parametrize(("index", "seed"), [(185, 1164307536), (196, 1954399528)])
def test_limit_of_an_exact_file_follows_the_error_of_torch(index: int, seed: int, tmp_path: Path) -> None:
    """Sharp attention: torch's angles in fp32 alone move its logits by 0.001 and 0.005."""
    case = replace(export_cases.generate("onnx", SEED, index), weights="codes", seed=seed)
    outcome = export_cases.run_case("onnx", case, tmp_path)
    assert outcome.kind == "right", outcome


def test_the_comparer_notices_a_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of q and k in the order of another rope, with the exporter's own verification off."""

    def unpermuted(array: Any, heads: int) -> Any:
        return array

    monkeypatch.setattr(exporter, "_verify", lambda *arguments: {})
    monkeypatch.setattr(writer, "permute_rope", unpermuted)
    cases = (export_cases.generate("gguf", SEED, index) for index in range(100))
    case = next(each for each in cases if each.family == "llama" and each.layers[0].num_attention_heads)
    assert export_cases.run_case("gguf", case, tmp_path).kind == "wrong"


@pytest.mark.parametrize("weights", ["codes", "random"])
def test_the_comparer_notices_one_head_in_the_place_of_another(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values of two heads, which the exporter's own reading of the file would change back."""
    stored = GraphValues._tensor

    def exchanged(self: Any, name: str) -> np.ndarray:
        array = stored(self, name)
        return np.roll(array, self.head_dim, axis=0) if name.endswith("v_proj.weight") else array

    monkeypatch.setattr(onnx_exporter, "_verify", lambda *arguments: {})
    monkeypatch.setattr(GraphValues, "_tensor", exchanged)
    cases = (export_cases.generate("onnx", SEED, index) for index in range(1000))
    layers = (LayerShape(4, 2, 96),)
    case = next(each for each in cases if (each.family, each.quantize, each.weights) == ("llama", "int8", weights))
    assert export_cases.run_case("onnx", replace(case, layers=layers), tmp_path).kind == "wrong"
