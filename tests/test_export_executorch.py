"""ExecuTorch programs of unequal tiny models against torch, and in ExecuTorch's own LLM runner."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import exporting
import numpy as np
import pytest
import torch
from exporting import EXACT, SHAPES, TOKENS
from safetensors.torch import load_file, save_file
from stored import STORED, store
from tiny import TWO_FACTORS, UNEQUAL, tiny_architecture
from tokenizers import Tokenizer

from efficientllm.export.checkpoint import open_checkpoint
from efficientllm.export.executorch.options import ExecutorchOptions
from efficientllm.runtime.base.errors import ArtefactError, ContextOverflowError, install_command
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.executorch import import_executorch, quiet_executorch
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.prompt import chat_prompt
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.source import load_for_inference

pytest.importorskip("executorch", reason="executorch is not installed")
pytestmark = pytest.mark.slow  # to import it takes seconds


def export(checkpoint: Path, output: Path, *more: str) -> int:
    return exporting.export(checkpoint, "executorch", output, "--max-context", "64", *more)


def expected_logits(checkpoint: Path, tokens: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return load_for_inference(checkpoint)(torch.tensor([tokens])).logits[0].numpy()


KINDS = (LayerShape(0, 0, 64), LayerShape(2, 1, 0), LayerShape(0, 0, 0), LayerShape(4, 2, 75))
"""Layers without attention, without FFN, without either and of an odd width: an export takes seconds a layer."""


def test_f32_prefill_and_decode_equal_torch(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Qwen 3, stored in two files of bf16. test_families.py has the other families."""
    checkpoint = save_tiny(tiny_architecture("qwen3", KINDS))
    store(checkpoint, STORED["bf16"], 2)
    assert export(checkpoint, tmp_path / "pte", "--quantize", "f32", "--no-verify") == 0
    engine = load_engine(tmp_path / "pte", EngineOptions(threads=1))
    rows = [engine.prefill(TOKENS[:16]), *(engine.decode(token) for token in TOKENS[16:])]
    assert np.abs(np.stack(rows) - expected_logits(checkpoint, TOKENS)[15:]).max() < 1e-3
    changed = [*TOKENS[:20], 7, 8, 9]  # shares 20 tokens with what the cache holds
    assert np.abs(engine.prefill(changed) - expected_logits(checkpoint, changed)[-1]).max() < 1e-3
    engine.close()


ONE_LAYER = (LayerShape(4, 2, 96),)
ODD_HEADS = (LayerShape(3, 1, 96),)
"""Heads of 16 channels do not fill the last group of int4."""
SMALL = ("--embedding-type", "int4", "--output-type", "int4", "--group-size", "64")


def test_int8_stays_close_and_another_code_is_refused(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Change a single bit of the program, too little for the logits to tell. The hidden size and FFN width are odd."""
    import_executorch()
    with quiet_executorch():
        from efficientllm.export.executorch import program, reader

    lower, lowered = program.lower, []

    def keep(*arguments: Any) -> program.LoweredProgram:
        lowered.append(lower(*arguments))
        return lowered[0]

    monkeypatch.setattr(program, "lower", keep)
    checkpoint = save_tiny(tiny_architecture("llama", SHAPES["odd FFN widths"][:1], hidden_size=76))
    assert export(checkpoint, tmp_path / "pte", "--quantize", "int8") == 0
    expect_close(tmp_path / "pte", 0.02)
    assert "zero-padded" not in capsys.readouterr().out

    named: Any = reader.deserialize_pte_binary(lowered[0].buffer).named_data
    changed = bytearray(lowered[0].buffer)
    changed[lowered[0].buffer.index(bytes(max(named.buffers, key=len)))] ^= 1
    monkeypatch.setattr(program, "lower", lambda *arguments: replace(lowered[0], buffer=bytes(changed)))
    assert export(checkpoint, tmp_path / "changed", "--quantize", "int8") == 2
    assert "executorch: the program holds no matrix with the codes that were given for" in capsys.readouterr().err


def expect_close(program: Path, largest_kl: float) -> None:
    """Expect verified codes, and logits near those of the checkpoint."""
    verification = Manifest.read(program).verification
    assert verification["codes"]["weights"] == "codes of the program, by ExecuTorch's package"
    assert verification["quantized"]["mean_kl"] < largest_kl


def test_other_formats(save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No LLM operators, fp16, and a 4-bit embedding with a context below the verification's first chunk.

    Without padding, int4 cannot hold the inputs of o_proj.
    """
    checkpoint = save_tiny(tiny_architecture(layers=ODD_HEADS, head_dim=16))
    found = {}
    for name, flags in {
        "f32": ["--quantize", "f32", "--no-custom-ops"],
        "f16": ["--quantize", "f16"],
        "small": [*SMALL, "--max-context", "32"],
    }.items():
        assert export(checkpoint, tmp_path / name, *flags) == 0
        found[name] = Manifest.read(tmp_path / name)
    sizes = {name: manifest.files["model.pte"]["bytes"] for name, manifest in found.items()}
    assert sizes["f32"] > sizes["f16"] > sizes["small"]
    assert export(checkpoint, tmp_path / "unfit", *SMALL, "--pad", "none") == 2
    assert "int4 needs inputs in multiples of 32; layers." in capsys.readouterr().err
    assert "llama::" not in " ".join(found["f32"].notes)


def test_calibration_brings_the_products_of_int4_closer(save_tiny: Callable[..., Path], corpus: Path) -> None:
    """Compare the errors of the attention's outputs on the calibration text, without a lowered program."""
    import_executorch()
    with quiet_executorch():
        from efficientllm.export.executorch import program, quantize
        from efficientllm.export.executorch.static_decoder import StaticDecoder

    name, options, errors = "layers.0.self_attn.o_proj", ExecutorchOptions(quantize="8da4w"), []
    weights = quantize.weight_format(options)
    with open_checkpoint(str(save_tiny(tiny_architecture(layers=ONE_LAYER)))) as checkpoint:
        grams = program._grams(checkpoint, str(corpus))
        assert grams is not None
        for given in (None, grams):
            decoder: Any = StaticDecoder(checkpoint, checkpoint.architecture, 64, custom_ops=False)
            exact = decoder.get_submodule(name).weight.detach().numpy().copy()
            quantize.quantize_decoder(decoder, weights, options, given)
            difference = quantize.given_weights(decoder, weights).tensors[f"model.{name}.weight"] - exact
            errors.append(np.sum(difference @ grams[name] * difference))
    assert errors[1] < errors[0]


def test_ropes_of_different_factors_have_separate_tables(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    architecture = tiny_architecture("gemma3_text", UNEQUAL[:2])
    checkpoint = save_tiny(architecture, rope_parameters=TWO_FACTORS, sliding_window_pattern=2)
    assert export(checkpoint, tmp_path / "pte", "--quantize", "f32") == 0
    assert Manifest.read(tmp_path / "pte").verification["exact"]["max_logit_difference"] < 1e-3


RUNNER = """
import json, sys
from efficientllm.runtime.engines.executorch import import_executorch
import_executorch()
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
runner = TextLLMRunner(sys.argv[1] + "/model.pte", sys.argv[1] + "/tokenizer.json")
pieces = []
config = GenerationConfig(max_new_tokens=int(sys.argv[3]), temperature=0.0, echo=False)
runner.generate(sys.argv[2], config, token_callback=pieces.append)
print(json.dumps("".join(pieces)))
"""


def runner_text(folder: Path, prompt: str, tokens: int) -> str:
    """What ExecuTorch's TextLLMRunner, the C++ runner of its phone apps, generates greedily."""
    command = [sys.executable, "-c", RUNNER, str(folder), prompt, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def speak_ascii_only(checkpoint: Path) -> None:
    """Zero the head of every other token: the runner's Python callback fails on a part of a character."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    for token, text in enumerate(tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())):
        if not (text.isascii() and text.isprintable() and text):
            tensors["lm_head.weight"][token] = 0
    save_file(tensors, file, metadata={"format": "pt"})


def test_stock_runner_generates_our_text(
    save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compare rounded weights of an odd hidden size, FFN width and attention; test_stock_runtimes.py compares fp32."""
    checkpoint = save_tiny(tiny_architecture("qwen2", (LayerShape(3, 1, 75),), hidden_size=76, head_dim=16, tied=False))
    speak_ascii_only(checkpoint)
    assert export(checkpoint, tmp_path / "pte", "--quantize", "8da4w") == 0
    printed = capsys.readouterr().out
    assert "zero-padded (exact): hidden 76 -> 96" in printed
    expect_close(tmp_path / "pte", 0.5)
    engine = load_engine(tmp_path / "pte", EngineOptions(threads=1))
    prompt = "The quick brown fox"
    pieces, logits = [], engine.prefill(engine.tokenize(prompt, special=False))
    for _ in range(8):
        token = int(logits.argmax())
        pieces.append(engine.token_bytes(token))
        logits = engine.decode(token)
    engine.close()
    expected = b"".join(pieces).decode("ascii")
    assert len(expected) >= 8
    assert runner_text(tmp_path / "pte", prompt, 8) == expected


def test_engine_keeps_to_its_context(exported: Callable[..., Path], artefact: Path) -> None:
    program = exported("executorch", *EXACT)
    engine = load_engine(program / "model.pte", EngineOptions(threads=1))  # a bare file works too
    assert engine.context_length == 128
    with pytest.raises(ContextOverflowError, match="129 tokens do not fit the context window of 128"):
        engine.prefill([5] * 129)
    engine.prefill([5] * 128)
    with pytest.raises(ContextOverflowError, match="129 tokens do not fit the context window of 128"):
        engine.decode(5)
    messages: Any = [{"role": "user", "content": "Größe 日本 🚀"}]
    texts = []
    for other in (engine, load_engine(artefact, EngineOptions(threads=1))):
        texts.append("".join(Generation(other, chat_prompt(other, messages), AnswerOptions(16))))
        assert 2 in other.end_ids
        other.close()
    assert texts[0] == texts[1]
    with pytest.raises(ArtefactError, match="holds 128 tokens, not 256; export it again with --max-context 256"):
        load_engine(program, EngineOptions(context=256))


def test_bad_input(save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_tiny(tiny_architecture(layers=ODD_HEADS, head_dim=16))
    for flags, message in {
        ("--quantize", "q8_0"): "--quantize q8_0: unknown for executorch; known: 8da4w, int8, f32, f16",
        ("--group-size", "48"): "--group-size 48: XNNPACK takes 32, 64, 128",
        ("--embedding-type", "q4_0"): "--embedding-type q4_0: executorch takes int8 or int4",
        ("--quantize", "f32", "--output-type", "int4"): "goes with --quantize 8da4w or int8, not f32",
        ("--pad", "none"): "layers.0.self_attn.o_proj has 48",
    }.items():
        assert export(checkpoint, tmp_path / "pte", *flags) == 2, flags
        assert message in capsys.readouterr().err
        assert not (tmp_path / "pte").exists()


def test_damaged_programs_are_refused(tmp_path: Path, artefact: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((artefact.parent / "checkpoint" / name).read_bytes())
    (tmp_path / "model.pte").write_bytes(b"not a program" * 20)
    with pytest.raises(ArtefactError, match=r"model\.pte is not a file of ExecuTorch"):
        load_engine(tmp_path / "model.pte")
    (tmp_path / "model.pte").write_bytes(b"1234ET12" * 20)
    with pytest.raises(ArtefactError, match=r"ExecuTorch cannot load it: .+"):
        load_engine(tmp_path / "model.pte")


def test_only_executorch_is_quieted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a program whose own logging is set at the root, where our loggers have no level of their own."""
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    monkeypatch.setattr(logging.getLogger("efficientllm"), "level", logging.NOTSET)
    with quiet_executorch():
        assert logging.getLogger("efficientllm.export").isEnabledFor(logging.INFO)
        assert not logging.getLogger("torch").isEnabledFor(logging.WARNING)
    assert logging.getLogger("efficientllm").level == logging.NOTSET


def test_missing_packages_of_the_extra_are_named(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "efficientllm.export.executorch.program", raising=False)
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    assert export(save_tiny(tiny_architecture()), tmp_path / "pte") == 2
    assert capsys.readouterr().err.endswith(f"is not installed; run: {install_command('executorch')}\n")
