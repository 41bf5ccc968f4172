"""Our files in a second, independently packaged llama.cpp (PyPI llama-cpp-py-sync), in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from exporting import SHAPES, TOKENS, export, greedy_answer
from tiny import tiny_architecture

pytest.importorskip("llama_cpp_py_sync", reason="llama-cpp-py-sync is not installed")

GENERATE = """
import json, sys
import llama_cpp_py_sync
model = llama_cpp_py_sync.Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False)
tokens = json.loads(sys.argv[2])
greedy = dict(temperature=0.0, top_k=1, top_p=1.0, min_p=0.0, repeat_penalty=1.0, repeat_last_n=0, seed=0)
model._configure_generation_sampler(**greedy)
past = model._eval_tokens(tokens, 0)
result = []
for _ in range(16):
    token = model._sample_token()
    result.append(int(token))
    past = model._eval_tokens([token], past)
print(json.dumps(result))
"""


@pytest.mark.parametrize(
    ("family", "shape"), [("llama", "unequal"), ("llama", "no FFN"), ("qwen2", "odd FFN widths"), ("qwen3", "unequal")]
)
def test_another_build_generates_the_same_tokens(
    family: str, shape: str, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = save_tiny(tiny_architecture(family, SHAPES[shape]))
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "f32") == 0
    expected = greedy_answer(checkpoint, 16)[0, len(TOKENS) :].tolist()
    command = [sys.executable, "-c", GENERATE, str(tmp_path / "gguf" / "model.gguf"), json.dumps(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
