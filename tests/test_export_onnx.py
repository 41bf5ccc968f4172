"""ONNX files of unequal tiny models in onnxruntime against torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporting import EXACT, SHAPES, TOKENS, export
from tiny import LLAMA3_ROPE, TWO_FACTORS, UNEQUAL, tiny_architecture

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import ContextOverflowError
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.prompt import chat_prompt
from efficientllm.train.model.attention import LayerAttention


def run_batch(folder: Path, tokens: list[list[int]], mask: list[list[int]], past: dict[str, np.ndarray]) -> Any:
    """Return (logits [B, V] or [B, S, V], the caches as the next call's past) of one call, without our engine."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array(tokens), "attention_mask": np.array(mask)}
    for value in session.get_inputs()[2:]:
        feeds[value.name] = past.get(value.name, np.zeros((len(tokens), value.shape[1], 0, value.shape[3]), np.float32))
    names = [value.name for value in session.get_outputs()]
    outputs: dict[str, Any] = dict(zip(names, session.run(names, feeds), strict=True))
    logits = outputs.pop("logits")
    logits = logits[:, 0] if logits.shape[1] == 1 else logits
    return logits, {name.replace("present", "past_key_values"): value for name, value in outputs.items()}


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantised_batch_gives_the_logits_of_its_prompts_alone(
    quantize: str, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    assert export(save_tiny(tiny_architecture()), "onnx", tmp_path / "onnx", "--quantize", quantize) == 0
    alone, _ = run_batch(tmp_path / "onnx", [TOKENS[:12]], [[1] * 12], {})
    batch, _ = run_batch(tmp_path / "onnx", [TOKENS[:12] + [0] * 8, TOKENS[:20]], [[1] * 12 + [0] * 8, [1] * 20], {})
    assert np.abs(batch[0] - alone[0]).max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("quantize", ["f16", "int8", "mixed", "int4", "web"])
def test_quantised_models_stay_close(
    family: str, quantize: str, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Odd hidden size and FFN widths, so that blocks are padded; tied and untied heads."""
    tied = family != "qwen2"
    checkpoint = save_tiny(tiny_architecture(family, SHAPES["odd FFN widths"], hidden_size=76, tied=tied))
    assert export(checkpoint, "onnx", tmp_path / "onnx", "--quantize", quantize) == 0
    agreement = Manifest.read(tmp_path / "onnx").verification["quantized"]
    assert agreement["mean_kl"] < {"f16": 1e-4, "int8": 0.01, "mixed": 0.1, "int4": 0.5, "web": 0.05}[quantize]


def test_calibration_brings_int4_closer(save_tiny: Callable[..., Path], corpus: Path, tmp_path: Path) -> None:
    """Widths that are not multiples of the block, so that the moments of the inputs are padded too."""
    checkpoint = save_tiny(tiny_architecture("qwen2", SHAPES["odd FFN widths"], hidden_size=76, tied=False))
    kl = []
    for name, flags in {"plain": [], "calibrated": ["--calibrate", str(corpus)]}.items():
        assert export(checkpoint, "onnx", tmp_path / name, "--quantize", "int4", *flags) == 0
        kl.append(Manifest.read(tmp_path / name).verification["quantized"]["mean_kl"])
    assert kl[1] < kl[0]


def test_tied_quantised_weights_are_stored_once(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    for tied in (True, False):
        checkpoint = save_tiny(tiny_architecture(tied=tied))
        assert export(checkpoint, "onnx", tmp_path / str(tied), "--quantize", "int8") == 0
    sizes = [Manifest.read(tmp_path / str(tied)).files["model.onnx_data"]["bytes"] for tied in (True, False)]
    assert sizes[1] - sizes[0] == pytest.approx(400 * 64 * (1 + 4 / 32), rel=0.05)


def test_llama3_rope_scaling(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_tiny(tiny_architecture(), rope_parameters=LLAMA3_ROPE)
    assert export(checkpoint, "onnx", tmp_path / "onnx", "--quantize", "f32") == 0


def test_ropes_of_different_factors_have_separate_tables(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    import onnx

    checkpoint = save_tiny(tiny_architecture("gemma3_text"), rope_parameters=TWO_FACTORS)
    assert export(checkpoint, "onnx", tmp_path / "onnx", "--quantize", "f32") == 0
    assert Manifest.read(tmp_path / "onnx").verification["exact"]["max_logit_difference"] < 1e-3
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    assert sum(value.name.startswith("cos") for value in graph.initializer) == 2  # three layers share them


def test_a_wrong_graph_of_few_bits_is_refused(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ropes share a table. The distance from the checkpoint is that of int4, but the graph is another function."""
    checkpoint = save_tiny(tiny_architecture("gemma3_text"), rope_parameters=TWO_FACTORS)
    monkeypatch.setattr(LayerAttention, "rotary_key", "one")
    assert export(checkpoint, "onnx", tmp_path / "onnx", "--quantize", "int4") == 2
    assert "differ by" in (error := capsys.readouterr().err)
    assert "from torch's with the file's own weights" in error
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("quantize", ["int8", "int4", "web"])
def test_the_engine_computes_the_codes_of_the_file(
    quantize: str, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Packed matrices, biases, padded heads and blocks, untied heads."""
    shape = tiny_architecture("qwen2", SHAPES["odd FFN widths"], hidden_size=76, head_dim=20, tied=False)
    assert export(save_tiny(shape), "onnx", tmp_path / "onnx", "--quantize", quantize) == 0
    codes = Manifest.read(tmp_path / "onnx").verification["codes"]
    assert len(codes["distances"]["worst"]) == 3
    assert max(codes["distances"]["worst"].values()) <= codes["limits"]["worst"] < 0.2


def test_both_engines_give_the_same_text(artefact: Path, exported: Callable[..., Path]) -> None:
    texts = []
    for path in (artefact, exported("onnx", *EXACT[:2])):
        engine = load_engine(path, EngineOptions(threads=1))
        messages: Any = [{"role": "user", "content": "Größe 日本 🚀 12345"}]
        texts.append("".join(Generation(engine, chat_prompt(engine, messages), AnswerOptions(32))))
        assert engine.bos_token == "<|im_start|>"
        assert 2 in engine.end_ids
        engine.close()
    assert texts[0] == texts[1]


def test_context_overflow_names_the_numbers(exported: Callable[..., Path]) -> None:
    engine = load_engine(exported("onnx", *EXACT[:2]), EngineOptions(threads=1, context=32))
    with pytest.raises(ContextOverflowError, match="33 tokens do not fit the context window of 32"):
        engine.prefill([5] * 33)
    engine.prefill([5] * 32)
    with pytest.raises(ContextOverflowError, match="33 tokens do not fit the context window of 32"):
        engine.decode(5)
    engine.close()


def test_wrong_graphs_are_caught(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from efficientllm.export.onnx import graph

    tables = graph.widened_tables
    monkeypatch.setattr(graph, "widened_tables", lambda *args: tables(*args)[::-1])
    assert export(save_tiny(tiny_architecture()), "onnx", tmp_path / "onnx", "--quantize", "f32") == 2
    assert "logits differ from torch's" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


def test_bad_input(save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(save_tiny(tiny_architecture(layers=UNEQUAL)), "onnx", tmp_path / "onnx", "--quantize", "q8_0") == 2
    assert "--quantize q8_0: unknown for onnx; known: f32, f16, int8, mixed, int4, web" in capsys.readouterr().err
    assert export(tmp_path / "checkpoint", "onnx", tmp_path / "onnx", "--no-verify") == 0
    (tmp_path / "onnx" / "model.onnx_data").write_bytes(b"short")
    from efficientllm.runtime import chat

    assert run_command(chat.body, [str(tmp_path / "onnx"), "Hi"]) == 2
    assert "copy it again" in capsys.readouterr().err
