"""Irregular models in OpenVINO, and in OpenVINO GenAI's own pipeline, against torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disks import small_disk
from exporting import EVERY_KIND, SHAPES, TOKENS, export, greedy_answer
from tiny import UNEQUAL, tiny_architecture, tiny_tokenizer
from tokenizers import pre_tokenizers

from efficientllm.export.openvino import exporter
from efficientllm.runtime.engines.manifest import Manifest

openvino = pytest.importorskip("openvino", reason="openvino is not installed")
openvino_genai = pytest.importorskip("openvino_genai", reason="openvino-genai is not installed")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _kept_signal_stack() -> Iterator[None]:
    with exporter.kept_signal_stack():
        yield


def signal_stack() -> bytes:
    stack = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).sigaltstack(None, stack)
    return stack.raw


def inputs_of(folder: Path) -> set[str]:
    return {value.any_name for value in openvino.Core().read_model(folder / "openvino_model.xml").inputs}


@pytest.mark.parametrize(
    ("family", "shape", "is_paged"),
    [("qwen2", UNEQUAL, False), ("llama", SHAPES["no FFN"], True), ("gemma3_text", SHAPES["uniform"], False)],
)
def test_openvino_genai_generates_the_tokens_of_torch(
    family: str, shape: Any, is_paged: bool, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Paged attention is chosen only if layers have heads of one ratio and no windows."""
    checkpoint = save_tiny(tiny_architecture(family, shape), eos_token_id=399)
    assert export(checkpoint, "openvino", tmp_path / "openvino", "--quantize", "f32") == 0
    expected = greedy_answer(checkpoint, 16)
    pipeline = openvino_genai.LLMPipeline(str(tmp_path / "openvino"), "CPU", **exporter.EXACT)
    config = openvino_genai.GenerationConfig(max_new_tokens=16, ignore_eos=True, do_sample=False)
    found = pipeline.generate(openvino.Tensor(np.array([TOKENS])), config).tokens[0]
    assert found == expected[0, len(TOKENS) :].tolist()
    assert ("position_ids" in inputs_of(tmp_path / "openvino")) == is_paged


@pytest.mark.parametrize(
    ("family", "quantize"), [("llama", "int8"), ("gemma3_text", "int4"), ("gpt_neox", "mixed"), ("smollm3", "int4")]
)
def test_the_model_computes_the_codes_exactly(
    family: str, quantize: str, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Windows, norms, biases, absent blocks, padded heads; decoding, chunks and a batch that is padded on the left."""
    checkpoint = save_tiny(tiny_architecture(family, EVERY_KIND, hidden_size=76, head_dim=20))
    stack = signal_stack()
    assert export(checkpoint, "openvino", tmp_path / "openvino", "--quantize", quantize) == 0
    assert signal_stack() == stack
    manifest = Manifest.read(tmp_path / "openvino")
    assert (manifest.engine, manifest.quantization) == ("openvino-genai", quantize)
    distances = manifest.verification["codes"]["distances"]["worst"]
    assert len(distances) == 3
    assert max(distances.values()) < 1e-4
    assert manifest.verification["openvino_genai"]["same_tokens"] == exporter.ANSWER_TOKENS


@pytest.mark.parametrize(("quantize", "stored"), [("int8", "u8"), ("int4", "u4")])
def test_matrices_of_any_width_stay_packed_in_memory(
    quantize: str, stored: str, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = save_tiny(tiny_architecture(layers=SHAPES["odd FFN widths"], hidden_size=76))
    assert export(checkpoint, "openvino", tmp_path / "openvino", "--quantize", quantize, "--no-verify") == 0
    model: Any = openvino.Core().compile_model(tmp_path / "openvino" / "openvino_model.xml", "CPU")
    nodes = [node for node in model.get_runtime_model().get_ops() if kind(node, "layerType") == "FullyConnected"]
    assert len(nodes) == 3 * 5 + 1
    assert {kind(node.input_value(1).get_node(), "outputPrecisions") for node in nodes} == {stored}


def kind(node: Any, name: str) -> str:
    """Return a property of a node of a compiled model."""
    return node.get_rt_info()[name].astype(str)


def test_a_wrong_graph_or_tokenizer_is_refused(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_tiny(tiny_architecture())
    with monkeypatch.context() as patch:
        patch.setattr("efficientllm.export.openvino.conversion.MASKED", 0.0)  # every token sees the later ones
        assert export(checkpoint, "openvino", tmp_path / "openvino", "--quantize", "int4") == 2
    assert "from torch's with the file's own weights" in capsys.readouterr().err
    other = tiny_tokenizer()
    other.add_tokens(["the"])
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.from_pretrained", lambda folder: other)
    assert export(checkpoint, "openvino", tmp_path / "openvino") == 2
    assert "its tokenizer gives other tokens than the checkpoint's from token" in capsys.readouterr().err
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.UnicodeScripts()
    assert export(checkpoint, "openvino", tmp_path / "openvino") == 2
    assert "error: openvino: cannot hold the tokenizer: Pre-tokenizer type 'Unicode" in capsys.readouterr().err
    assert not (tmp_path / "openvino").exists()


@pytest.mark.parametrize("kilobytes", [500, 900, 1300])
def test_a_full_disk_is_one_line(
    kilobytes: int, save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ONNX graph does not fit, or the model beside it, which OpenVINO removes before it fails."""
    checkpoint = save_tiny(tiny_architecture())
    with small_disk(tmp_path / "disk", kilobytes) as folder:
        assert export(checkpoint, "openvino", folder / "out", "--quantize", "f32", "--no-verify") == 2
        assert "out cannot be written: the disk is full (" in capsys.readouterr().err
        assert not any(folder.iterdir())
