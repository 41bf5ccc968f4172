"""Prompts that are kept on disk: they continue after a restart, within their bytes, and damaged files do no harm."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import loaded_pool, serve
from test_recurrent import write_mamba

from efficientllm.runtime.engines.engine import CacheChoice, EngineOptions, load_engine
from efficientllm.runtime.engines.prompt_store import PromptStore
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.server.models.pool_options import PoolOptions
from efficientllm.server.options import AppOptions

PROMPT = [5 + (7 * step) % 300 for step in range(100)]
OTHER = [9 + (11 * step) % 300 for step in range(100)]


def load(path: Path, kv_cache: CacheChoice = "f32") -> EngineScheduler:
    return load_engine(path, EngineOptions(threads=1, context=256, parallel=3, kv_cache=kv_cache, tune=False))


def store_of(engine: EngineScheduler, folder: Path, max_bytes: int = 10**9) -> PromptStore:
    store = engine.prompt_store(folder, "model", max_bytes)
    assert store is not None
    return store


def save(engine: EngineScheduler, store: PromptStore) -> None:
    with engine.caches() as caches:
        store.save(caches)


def restore(engine: EngineScheduler, store: PromptStore) -> int:
    with engine.caches() as caches:
        return store.restore(caches)


@pytest.mark.parametrize("model", ["f32", "q8_0", "recurrent"])
def test_a_prompt_continues_after_a_restart(artefact: Path, tmp_path: Path, model: str) -> None:
    path = artefact
    if model == "recurrent":
        write_mamba(path := tmp_path / "mamba.gguf", artefact / "model.gguf")
    kv_cache: CacheChoice = "q8_0" if model == "q8_0" else "f32" if model == "f32" else "auto"
    longer = [*PROMPT, 301, 302]
    with_state = load(path, kv_cache)
    with_state.prefill(OTHER)
    with_state.prefill(PROMPT)
    save(with_state, store_of(with_state, tmp_path / "kept"))
    expected = with_state.prefill(longer)
    with_state.close()
    restarted = load(path, kv_cache)
    store = store_of(restarted, tmp_path / "kept")
    assert restore(restarted, store) == 200
    generation = Generation(restarted, longer, AnswerOptions(1))
    generation.begin()
    np.testing.assert_allclose(restarted.logits(generation.lease), expected, atol=1e-4)
    assert generation.lease.cached_tokens == 100
    restarted.close()


def test_much_alike_prompts_are_stored_once(artefact: Path, tmp_path: Path) -> None:
    engine = load(artefact)
    for end in range(3):
        engine.prefill([*PROMPT, 310 + end, 320, 330])
    engine.prefill([5, 6, 7])
    store = store_of(engine, tmp_path)
    save(engine, store)
    assert len(list(tmp_path.iterdir())) == 1
    ((tokens, _),) = store.read()
    assert tokens[:101] == [*PROMPT, 312]
    engine.close()


@pytest.mark.parametrize("damage", ["byte", "cut", "header", "empty"])
def test_damaged_prompt_file_is_removed_with_one_line(
    artefact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    engine = load(artefact)
    store = store_of(engine, tmp_path)
    engine.prefill(PROMPT)
    save(engine, store)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "byte":
        content[-100] ^= 1
    path.write_bytes({"cut": content[:-7], "header": b"{}" + content, "empty": b""}.get(damage, bytes(content)))
    fresh = load(artefact)
    with caplog.at_level(logging.WARNING):
        assert restore(fresh, store) == 0
    (line,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert line.startswith(f"stored prompt {path} is damaged (")
    assert "\n" not in line
    assert not list(tmp_path.iterdir())
    fresh.close()
    engine.close()


def test_files_of_other_models_and_settings_are_left_alone(artefact: Path, tmp_path: Path) -> None:
    one, other = load(artefact, "f32"), load(artefact, "f16")
    one.prefill(PROMPT)
    save(one, store_of(one, tmp_path))
    assert restore(other, store_of(other, tmp_path)) == 0
    foreign = one.prompt_store(tmp_path, "another model", 10**9)
    assert foreign is not None
    assert not list(foreign.read())
    assert len(list(tmp_path.iterdir())) == 1
    for engine in (one, other):
        engine.close()


def test_files_stay_within_their_bytes_and_the_newest_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = PromptStore(tmp_path, "key", 5000)
    for number in range(6):
        store.write([number] * 100, memoryview(bytes(1000)))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5000
    assert [tokens[0] for tokens, _ in store.read()] == [5, 4, 3]
    with caplog.at_level(logging.WARNING):
        store.write([9] * 100, memoryview(bytes(6000)))
    assert "a prompt of 100 tokens is not stored: it takes" in caplog.text
    assert len(list(store.read())) == 3


def test_refused_state_of_a_prompt_is_evaluated_again(artefact: Path, tmp_path: Path) -> None:
    engine = load(artefact)
    store = store_of(engine, tmp_path)
    store.write(PROMPT, memoryview(b"nonsense" * 100))
    restore(engine, store)
    expected = load(artefact)
    np.testing.assert_allclose(engine.prefill(PROMPT), expected.prefill(PROMPT), atol=1e-4)
    assert engine._own_lease.cached_tokens == 0
    expected.close()
    engine.close()


def test_a_server_continues_prompts_after_a_restart(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path))
    body = {"messages": [{"role": "system", "content": "Be brief. " * 30}, {"role": "user", "content": "Hello"}]}
    answers = []
    for kept in (10**8, 10**8, 0):
        pool = loaded_pool(
            {"tiny": str(artefact)}, EngineOptions(threads=1, context=1024, tune=False), PoolOptions(prompt_cache=kept)
        )
        with serve(pool, AppOptions()) as address:
            sent = {**body, "max_tokens": 4, "temperature": 0}
            answers.append(httpx.post(f"{address}/v1/chat/completions", json=sent, timeout=60).json())
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [0, answers[0]["usage"]["prompt_tokens"] - 1, 0]
    assert len({json.dumps(answer["choices"]) for answer in answers}) == 1
    assert (tmp_path / "prompts").stat().st_mode & 0o077 == 0
