"""Stock onnxruntime-genai: our irregular folders in its runtime, its builder's folders in ours and in its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import EXACT, SHAPES, TOKENS, export, greedy_answer
from tiny import tiny_architecture

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.source import load_for_inference
from research.peers import genai_builder

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")


GENAI = """
import json, sys
import onnxruntime_genai as genai
model = genai.Model(sys.argv[1])
parameters = genai.GeneratorParams(model)
tokens = json.loads(sys.argv[2])
parameters.set_search_options(max_length=len(tokens) + 16, min_length=len(tokens) + 16, do_sample=False)
generator = genai.Generator(model, parameters)
generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)]))
"""


@pytest.mark.parametrize(
    ("family", "shape"),
    [("llama", "no attention in the middle"), ("llama", "odd FFN widths"), ("qwen2", "unequal"), ("qwen3", "unequal")],
)
def test_stock_genai_generates_the_same_tokens(
    family: str, shape: str, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = save_tiny(tiny_architecture(family, SHAPES[shape]), eos_token_id=399)
    assert export(checkpoint, "onnx", tmp_path / "onnx", "--quantize", "f32") == 0
    expected = greedy_answer(checkpoint, 16)
    command = [sys.executable, "-c", GENAI, str(tmp_path / "onnx"), json.dumps(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected[0].tolist()


LOGITS = """
import json, sys
import numpy as np
import onnxruntime_genai as genai
model, end = genai.Model(sys.argv[1]), 2
rows = []
for prompts in json.loads(sys.argv[2]):
    length = max(map(len, prompts))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length + 1, batch_size=len(prompts))
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt + [end] * (length - len(prompt)) for prompt in prompts], np.int32))
    rows.append(np.array(generator.get_logits()).reshape(len(prompts), -1)[-1].tolist())
print(json.dumps(rows))
"""


def test_stock_genai_takes_a_batch_of_unequal_prompts(exported: Callable[..., Path]) -> None:
    """The second prompt of a padded batch has the logits that it has alone."""
    batches = [[TOKENS, TOKENS[:9]], [TOKENS[:9]]]
    command = [sys.executable, "-c", LOGITS, str(exported("onnx", *EXACT[:2])), json.dumps(batches)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    padded, alone = np.array(json.loads(done.stdout.splitlines()[-1]))
    assert np.abs(padded - alone).max() < 1e-4


@pytest.mark.slow
def test_folders_of_its_builder_run_in_both_engines(
    save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its runtime; and without our manifest, as anybody's folder, in our engine, which finds the cache sizes."""
    checkpoint, folder = save_tiny(tiny_architecture(layers=(LayerShape(4, 2, 96),) * 2)), tmp_path / "peer"
    assert run_command(genai_builder.body, [str(checkpoint), str(folder), "--quantize", "f32"]) == 0
    with torch.inference_mode():
        expected = load_for_inference(checkpoint)(torch.tensor([TOKENS])).logits[0].numpy()
    options = EngineOptions(threads=1, context=64)
    engines = [EngineScheduler(genai_builder.GenaiEngine(folder / "model.onnx", options))]
    (folder / "manifest.json").unlink()
    engines.append(load_engine(folder, options))
    for engine in engines:
        rows = [engine.prefill(TOKENS[:16]), *(engine.decode(token) for token in TOKENS[16:])]
        assert np.abs(np.stack(rows) - expected[15:]).max() < 1e-3
        engine.close()
    artefact = Artefact.open(folder)
    assert (artefact.engine, artefact.manifest) == ("onnxruntime", None)
    assert {file.name for file in artefact.files} >= {"model.onnx", "model.onnx.data", "tokenizer.json"}
    assert run_command(genai_builder.body, [str(checkpoint), str(folder)]) == 2
    assert "give another folder" in capsys.readouterr().err
    irregular = save_tiny(tiny_architecture())
    assert run_command(genai_builder.body, [str(irregular), str(tmp_path / "other")]) == 2
    assert "give a uniform model" in capsys.readouterr().err
