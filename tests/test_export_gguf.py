"""GGUF files of unequal tiny models in stock llama.cpp against torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import SHAPES, TOKENS, export
from safetensors.torch import load_file, save_file
from tiny import LLAMA3_ROPE, tiny_architecture
from training import ERRORS

from efficientllm.export import verification
from efficientllm.export.checkpoint import Checkpoint
from efficientllm.export.gguf import exporter, layout, tensor_data
from efficientllm.export.gguf.layout import plan_layout
from efficientllm.export.gguf.probe import RUNS, probe
from efficientllm.runtime.base.errors import ArtefactError
from efficientllm.runtime.base.gguf_header import read_header
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.train.model.architecture import FAMILIES, LayerShape
from efficientllm.train.model.source import load_for_inference
from efficientllm.train.model.tensors import tensor_names, tensor_shape

SHORT = (LayerShape(4, 4, 128), LayerShape(2, 2, 96))
UNQUANTISED = (0, 1)
"""ggml types F32 and F16."""


LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
WINDOW_ROPE = {"rope_type": "default", "rope_theta": 500.0}
ROPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", LLAMA3_ROPE),
    ("llama", LINEAR_ROPE),
    ("olmo2", LINEAR_ROPE),
    ("gemma3_text", {"full_attention": LINEAR_ROPE, "sliding_attention": WINDOW_ROPE}),
]


@pytest.mark.parametrize(("family", "rope"), ROPES)
def test_rope_scaling(family: str, rope: dict[str, Any], save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_tiny(tiny_architecture(family), rope_parameters=rope)
    for target in ("gguf", "onnx"):
        assert export(checkpoint, target, tmp_path / target, "--quantize", "f32") == 0


UNSTORABLE = [
    ("gemma3_text", {"full_attention": LLAMA3_ROPE, "sliding_attention": LINEAR_ROPE | {"rope_type": "default"}}),
    ("gemma3_text", {"full_attention": LINEAR_ROPE, "sliding_attention": LINEAR_ROPE}),
    ("qwen3", LLAMA3_ROPE),
    ("llama", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}),
]


@pytest.mark.parametrize(("family", "rope"), UNSTORABLE)
def test_ropes_that_llama_cpp_cannot_store_are_refused_at_once(
    family: str,
    rope: dict[str, Any],
    save_tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: ERRORS,
) -> None:
    monkeypatch.setattr(exporter, "write_gguf", lambda *args: pytest.fail("a refused file was written"))
    checkpoint = save_tiny(tiny_architecture(family))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    assert export(checkpoint, "gguf", tmp_path / "gguf") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: gguf: layer 0 has ") or "error: gguf: layer 2 has a llama3 rope" in error
    assert len(error.splitlines()) == 1


def test_a_window_that_llama_cpp_ignores_ends_the_context(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """ONNX has the windows and the whole context."""
    windows = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    checkpoint = save_tiny(tiny_architecture("qwen3"), **windows)
    contexts = {}
    for target in ("gguf", "onnx"):
        assert export(checkpoint, target, tmp_path / target, "--quantize", "f32") == 0
        contexts[target] = Manifest.read(tmp_path / target).context_length
    assert contexts == {"gguf": 24, "onnx": 512}


@pytest.mark.parametrize("quantize", ["f16", "bf16", "q8_0", "q5_k_m", "iq4_nl"])
def test_quantised_files_are_measured(quantize: str, save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_tiny(tiny_architecture())
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", quantize) == 0
    manifest = Manifest.read(tmp_path / "gguf")
    assert manifest.quantization == quantize
    assert manifest.bits_per_weight == pytest.approx(8 * manifest.total_bytes / 124_000, rel=0.8)
    assert 0 < manifest.verification["quantized"]["mean_kl"] < 1
    manifest.check_files(tmp_path / "gguf")


def test_greedy_text_equals_torch(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_tiny(tiny_architecture())
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "f32") == 0
    model = load_for_inference(checkpoint)
    expected = model.generate(
        torch.tensor([TOKENS]), max_new_tokens=24, do_sample=False, attention_mask=torch.ones(1, 40, dtype=torch.long)
    )[0].tolist()
    # torch's keys and values are fp32; which cache `auto` takes is a matter of speed
    engine = load_engine(tmp_path / "gguf", EngineOptions(threads=1, kv_cache="f32"))
    generation = Generation(engine, TOKENS, AnswerOptions(24))
    list(generation)
    assert generation.tokens == expected
    engine.close()


def test_padding_is_exact_and_named(save_tiny: Callable[..., Path], tmp_path: Path, capsys: ERRORS) -> None:
    checkpoint = save_tiny(tiny_architecture(layers=SHAPES["odd FFN widths"], hidden_size=75))
    assert export(checkpoint, "gguf", tmp_path / "padded", "--quantize", "q8_0") == 0
    assert "zero-padded (exact): hidden 75 -> 96, FFN width of 2 of 3 layers" in capsys.readouterr().out
    assert export(checkpoint, "gguf", tmp_path / "plain", "--quantize", "q8_0", "--pad", "none") == 0
    printed = capsys.readouterr().out
    assert "tensors became f16, not q8_0: their rows are not multiples of 32 (--pad auto avoids that): " in printed
    assert "attn_q x3" in printed


@pytest.mark.parametrize(("family", "head_dim"), [("olmo2", 48), ("smollm3", 16), ("olmo", 48)])
def test_a_uniform_file_has_whole_blocks_in_its_rows(
    family: str, head_dim: int, save_tiny: Callable[..., Path], tmp_path: Path, capsys: ERRORS
) -> None:
    """Three heads do not divide 64: rows of 66 weights would be f16 and not q8_0."""
    layers = (LayerShape(3, 3, 64), LayerShape(3, 3, 96))
    checkpoint = save_tiny(tiny_architecture(family, layers, head_dim=head_dim))
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "q8_0", "--no-verify") == 0
    assert "attn_q" not in capsys.readouterr().out.partition("became f16")[2]


ONE_BLOCK = (LayerShape(0, 0, 96), LayerShape(1, 1, 96), LayerShape(4, 2, 0), LayerShape(2, 1, 32))
"""Layers with rows of one block of 32, or without rows: no attention first, a lone head, no FFN, 32 channels.

On CPUs with AMX, llama.cpp multiplies rows of one block wrongly. The tests look at the file, since this CPU may be
another one.
"""


@pytest.mark.parametrize("hidden_size", [64, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_has_at_least_two_blocks_in_a_row(
    family: str, hidden_size: int, save_tiny: Callable[..., Path]
) -> None:
    folder = save_tiny(tiny_architecture(family, ONE_BLOCK, hidden_size=hidden_size))
    for row_multiple in (1, 32, 64):
        shape = plan_layout(Checkpoint(folder, "one block"), row_multiple).architecture
        rows = {name: tensor_shape(shape, name)[-1] for name in tensor_names(shape) if name.endswith("_proj.weight")}
        assert min(rows.values()) >= 64, rows


@pytest.mark.parametrize(
    ("family", "quantize", "flags", "max_kl"),
    [
        ("llama", "q8_0", [], 0.01),
        ("olmo", "q8_0", ["--pad", "none"], 0.01),
        ("qwen3", "q4_1", [], 0.5),
        ("olmo", "q4_0", [], 0.5),
        ("llama", "q4_k_m", [], 0.5),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, list) else None,
)
def test_quantised_rows_of_fillers_and_lone_heads_have_two_blocks(
    family: str, quantize: str, flags: list[str], max_kl: float, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = save_tiny(tiny_architecture(family, ONE_BLOCK))
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", quantize, *flags) == 0
    tensors = read_header(tmp_path / "gguf" / "model.gguf").tensors
    quantised = {tensor.name: tensor.shape[-1] for tensor in tensors if tensor.kind not in UNQUANTISED}
    assert {"blk.0.attn_output.weight", "blk.1.attn_output.weight", "blk.2.ffn_down.weight"} <= set(quantised)
    assert min(quantised.values()) >= 64, quantised
    verification = Manifest.read(tmp_path / "gguf").verification
    assert verification["exact"]["max_logit_difference"] < 1e-3
    assert verification["quantized"]["mean_kl"] < max_kl


def test_a_file_with_rows_of_one_block_is_refused(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    monkeypatch.setattr(layout, "padded_architecture", lambda architecture, multiple: architecture)
    assert export(save_tiny(tiny_architecture(layers=ONE_BLOCK)), "gguf", tmp_path / "gguf", "--quantize", "q8_0") == 2
    assert "blk.1.attn_output.weight has quantised rows of 32 weights" in capsys.readouterr().err
    assert not (tmp_path / "gguf").exists()


def test_k_quants_name_the_tensors_of_another_type(
    save_tiny: Callable[..., Path], tmp_path: Path, capsys: ERRORS
) -> None:
    assert export(save_tiny(tiny_architecture()), "gguf", tmp_path / "gguf", "--quantize", "q4_k_m") == 0
    assert "tensors became q5_0, not q4_k: their rows are not multiples of 256: " in capsys.readouterr().out
    assert any("became q5_0" in note for note in Manifest.read(tmp_path / "gguf").notes)


def test_export_past_the_limit_is_refused_and_leaves_nothing(
    save_tiny: Callable[..., Path], tmp_path: Path, capsys: ERRORS
) -> None:
    checkpoint = save_tiny(tiny_architecture())
    limit = ["--quantize", "q4_0", "--max-kl", "1e-6"]
    assert export(checkpoint, "gguf", tmp_path / "out" / "gguf", *limit) == 2
    assert "quantisation gives a mean KL of" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert export(checkpoint, "gguf", tmp_path / "out" / "gguf", *limit, "--no-verify") == 0
    assert Manifest.read(tmp_path / "out" / "gguf").verification == {}


def test_the_limit_of_kl_and_perplexity_is_the_users() -> None:
    fine = verification.Agreement(192, 1.0, 0.9, mean_kl=0.2, perplexity_ratio=1.2)
    further, worse = dataclasses.replace(fine, mean_kl=0.31), dataclasses.replace(fine, perplexity_ratio=1.36)
    for agreement, message in ((further, "a mean KL of 0.310"), (worse, "perplexity by 1.36")):
        verification.check_distance(agreement, None, "gguf")
        verification.check_distance(agreement, 0.5, "gguf")
        with pytest.raises(ArtefactError, match=message):
            verification.check_distance(agreement, 0.3, "gguf")


@pytest.mark.parametrize(
    ("family", "quantize"), [("olmo", "q4_k_m"), ("gpt_neox", "q4_0"), ("gemma3_text", "q4_k_m"), ("qwen3", "q4_0")]
)
def test_the_engine_computes_the_codes_of_the_file(
    family: str, quantize: str, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where weights are centred, fused, permuted, padded or rescaled in the file."""
    checkpoint = save_tiny(tiny_architecture(family, hidden_size=75))
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", quantize) == 0
    codes = Manifest.read(tmp_path / "gguf").verification["codes"]
    assert set(codes["distances"]["mean"]) == {run.title for run in RUNS}
    assert max(codes["distances"]["mean"].values()) <= codes["limits"]["mean"]
    assert codes["cpu"]["model"]


@pytest.mark.parametrize("quantize", ["q4_0", "f16"])
def test_a_file_with_other_weights_is_refused(
    quantize: str, save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    """llama.cpp computes the codes of the file, but the file has those of another model."""

    def damage(target: Path) -> None:
        tensor = next(each for each in read_header(target).tensors if each.name == "blk.1.ffn_up.weight")
        with target.open("r+b") as stream:
            stream.seek(tensor.offset)
            data = stream.read(tensor_data.num_bytes(tensor))
            stream.seek(tensor.offset)
            stream.write(data[len(data) // 2 :] + data[: len(data) // 2])

    monkeypatch.setattr(exporter, "check_rows", damage)
    assert export(save_tiny(tiny_architecture()), "gguf", tmp_path / "gguf", "--quantize", quantize) == 2
    assert "the stored model.layers.1.mlp.up_proj.weight is 1" in capsys.readouterr().err
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize(("own_error", "code"), [(0.004, 0), (0.001, 2)])
def test_limit_follows_the_error_of_torch(
    own_error: float, code: int, save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp may be twice as far from torch as torch is from exact numbers."""

    def moved(*arguments: Any) -> Any:
        found = probe(*arguments)
        return dataclasses.replace(found, logits=[logits + np.float32(0.005) for logits in found.logits])

    monkeypatch.setattr(exporter, "probe", moved)
    monkeypatch.setattr(verification, "torch_error", lambda *_: own_error)
    assert export(save_tiny(tiny_architecture()), "gguf", tmp_path / "gguf", "--quantize", "f32") == code


def test_export_allows_the_drift_of_angles_that_llama_cpp_multiplies(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """A base of 3 leaves every channel fast. Torch with angles that are products of fp32 ratios computes the file."""
    rope = {"rope_type": "default", "rope_theta": 3.0}
    checkpoint = save_tiny(tiny_architecture("olmo", SHORT, 33, False, 256), rope_parameters=rope)
    weights = load_file(checkpoint / "model.safetensors")
    matrices = {name: 8 * each if "_proj" in name else each for name, each in weights.items()}
    save_file(matrices, checkpoint / "model.safetensors", {"format": "pt"})
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "f32") == 0
    model = load_for_inference(checkpoint)
    tokens = (TOKENS * 256)[:256]
    found = probe(tmp_path / "gguf" / "model.gguf", tokens).logits[0]
    differences = []
    for _ in range(2):
        with torch.inference_mode():
            differences.append(float(np.abs(model(torch.tensor([tokens])).logits[0].numpy() - found).max()))
        model.base_model.rotary_emb.register_forward_hook(multiplied_angles)
    assert differences[1] < 2e-4 < 1e-3 < differences[0]


def multiplied_angles(module: Any, inputs: Any, outputs: Any) -> Any:
    """Compute angles as ggml does: that of a channel is the last one's times an fp32 ratio."""
    ratio = torch.tensor(3.0).pow(-1 / len(module.inv_freq))
    angles = [torch.arange(outputs[0].shape[1]).float()]
    while len(angles) < len(module.inv_freq):
        angles.append(angles[-1] * ratio)
    doubled = torch.stack(angles, 1).repeat(1, 2)[None]
    return doubled.cos(), doubled.sin()


def test_wrong_weights_are_caught(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    """The gate fails where q and k are not permuted for llama.cpp's rope."""
    from efficientllm.export.gguf import writer

    monkeypatch.setattr(writer, "permute_rope", lambda array, heads: array)
    assert export(save_tiny(tiny_architecture()), "gguf", tmp_path / "gguf", "--quantize", "f32") == 2
    assert "logits differ from torch's" in capsys.readouterr().err
    assert not (tmp_path / "gguf").exists()


def test_unloadable_file_gives_one_line_and_leaves_no_folder(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    plan_layout = exporter.plan_layout
    monkeypatch.setattr(exporter, "plan_layout", lambda *args: dataclasses.replace(plan_layout(*args), name="llama"))
    assert export(save_tiny(tiny_architecture()), "gguf", tmp_path / "gguf", "--quantize", "f32") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: llama.cpp cannot run model.gguf: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "gguf").exists()


def test_unknown_pre_tokenizer_is_refused(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_tiny(tiny_architecture())
    path = checkpoint / "tokenizer.json"
    data = json.loads(path.read_text())
    data["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(data))
    assert export(checkpoint, "gguf", tmp_path / "gguf") == 2


BAD_INPUT = [
    (["--quantize", "q9"], "--quantize q9: unknown for gguf; known: f32, f16"),
    (["--output-type", "q9"], "--output-type q9: unknown tensor type"),
    (["--output-type", "q6_k"], "--output-type q6_k stores rows in blocks of 256 weights, and the rows of this file"),
    (["--embedding-type", "q6_k"], "have 64; choose one with blocks of 32, such as q8_0"),
    (["--pad", "some"], "'some' is not one of auto, none"),
]


@pytest.mark.parametrize(("more", "message"), BAD_INPUT)
def test_bad_input(
    more: list[str], message: str, save_tiny: Callable[..., Path], tmp_path: Path, capsys: ERRORS
) -> None:
    assert export(save_tiny(tiny_architecture(tied=False)), "gguf", tmp_path / "gguf", *more) == 2
    assert message in capsys.readouterr().err


def test_a_type_for_rows_without_whole_blocks_is_named(
    save_tiny: Callable[..., Path], tmp_path: Path, capsys: ERRORS
) -> None:
    checkpoint = save_tiny(tiny_architecture(hidden_size=75))
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--pad", "none", "--embedding-type", "q8_0") == 2
    assert "blocks of 32 weights, and the rows of this file have 75; choose f16" in capsys.readouterr().err


def test_damaged_checkpoints(save_tiny: Callable[..., Path], tmp_path: Path, capsys: ERRORS) -> None:
    checkpoint = save_tiny(tiny_architecture())
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert export(checkpoint, "gguf", tmp_path / "gguf") == 2
    assert "is damaged" in capsys.readouterr().err
    weights.unlink()
    assert export(checkpoint, "gguf", tmp_path / "gguf") == 2
    assert "has no model.safetensors and no" in capsys.readouterr().err
    assert export(tmp_path / "nothing", "gguf", tmp_path / "gguf") == 2
    assert "no such folder" in capsys.readouterr().err


def test_sample_covers_every_kind_of_text() -> None:
    text = verification.sample_text()
    assert {"日", "🚀", "é", "{", "\t"} <= set(text)
