"""Pinned prompts stay evaluated, whatever other prompts need the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving import loaded_pool, serve

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.server import cli
from efficientllm.server.models.pool_options import PoolOptions
from efficientllm.server.options import AppOptions

PREFIX = [5 + 7 * step % 300 for step in range(150)]
SYSTEM = "You are the voice of a house with eleven rooms, and you answer with the name of one of them. " * 3


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_pinned_prompt_outlasts_all_others(exported: Any, target: str) -> None:
    """Also many that fill the whole cache, at once and one by one, with the logits of a fresh evaluation."""
    path = exported("gguf", "--quantize", "f32") if target == "gguf" else exported("onnx")
    kv_cache: Any = "f32" if target == "gguf" else "auto"
    engine = load_engine(path, EngineOptions(threads=1, context=256, parallel=3, kv_cache=kv_cache))
    slots = engine.cache_slots
    engine.pin(PREFIX)
    assert (engine.num_sequences, engine.cache_slots) == (2, slots - len(PREFIX))
    for index in range(6):
        list(Generation(engine, [9 + (11 * step + index) % 300 for step in range(200)], AnswerOptions(20)))
    for question in ([301, 302], [303]):
        generation = Generation(engine, [*PREFIX, *question], AnswerOptions(1))
        generation.begin()
        logits = engine.logits(generation.lease)
        assert generation.lease.cached_tokens == len(PREFIX)
        plain = load_engine(path, EngineOptions(threads=1, context=256, kv_cache=kv_cache))
        np.testing.assert_allclose(logits, plain.prefill([*PREFIX, *question]), atol=1e-3)
        plain.close()
        engine.release(generation.lease)
    engine.close()


@pytest.mark.parametrize("kind", ["text", "messages", "request"])
def test_the_server_pins_a_prompt_at_the_start(artefact: Path, tmp_path: Path, kind: str) -> None:
    messages = [{"role": "system", "content": SYSTEM}]
    path = tmp_path / ("prompt.txt" if kind == "text" else "prompt.json")
    content = messages if kind == "messages" else {"messages": messages}
    path.write_text(SYSTEM if kind == "text" else json.dumps(content), encoding="utf-8")
    pool = loaded_pool(
        {"tiny": str(artefact)}, EngineOptions(threads=1, context=1024, parallel=3), PoolOptions(pin=(str(path),))
    )
    with serve(pool, AppOptions()) as address:
        asked = {"messages": [*messages, {"role": "user", "content": "Where am I?"}], "max_tokens": 2}
        for _ in range(2):
            usage = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=60).json()["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert 150 < usage["prompt_tokens"] - 30 < cached < usage["prompt_tokens"]
            for index in range(4):
                other = {"prompt": f"{index} " * 200, "max_tokens": 2}
                assert httpx.post(f"{address}/v1/completions", json=other, timeout=60).status_code == 200


def test_unpinnable_prompt_gives_one_line(artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (malformed := tmp_path / "malformed.json").write_text("[")
    (wrong := tmp_path / "wrong.json").write_text('[{"role": "robot", "content": "x"}]')
    (text := tmp_path / "text").write_text("Be brief.")
    (empty := tmp_path / "empty").touch()
    command = [str(artefact), "--port", "18765", "--threads", "1", "--no-tune", "--context", "64"]
    for path, flags, message in (
        (tmp_path / "missing", [], f"--pin {tmp_path / 'missing'}: no such file; give a text"),
        (empty, [], f"--pin {empty}: is empty"),
        (malformed, [], f"--pin {malformed}: cannot be read: "),
        (wrong, [], f"--pin {wrong}: messages.0.role"),
        (text, ["--parallel", "1"], "--pin: a pinned prompt needs a sequence of its own"),
    ):
        assert run_command(cli.body, [*command, "--pin", str(path), *flags]) == 2
        error = capsys.readouterr().err.strip()
        assert error.splitlines()[-1].startswith(f"error: {message}")
    engine = load_engine(artefact, EngineOptions(threads=1, context=64, parallel=1))
    with pytest.raises(UsageError, match="--parallel"):
        engine.pin([5, 6])
    engine.close()
