"""The endpoint with the real openai client against a real (tiny) model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import openai_client, served

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.prompt import chat_prompt
from efficientllm.server import cli
from efficientllm.server.models.pool_options import PoolOptions
from efficientllm.server.options import AppOptions

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def address(artefact: Path) -> Iterator[str]:
    with served(artefact, AppOptions(api_key="secret"), PoolOptions(waiting=3)) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai_client(address, "secret") as client:
        yield client


def test_server_gives_the_answer_of_the_engine(client: openai.OpenAI, artefact: Path) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, temperature=0)
    engine = load_engine(artefact, EngineOptions(threads=1))
    generation = Generation(engine, chat_prompt(engine, MESSAGES), AnswerOptions(12))
    assert answer.choices[0].message.content == "".join(generation)
    assert answer.choices[0].finish_reason == generation.stats.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == generation.stats.prompt_tokens
    assert answer.usage.completion_tokens == generation.stats.completion_tokens
    engine.close()


def test_streamed_answer_is_the_same(client: openai.OpenAI) -> None:
    settings: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 1.0, "seed": 7}
    whole = client.chat.completions.create(**settings).choices[0].message.content
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage is not None
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")


def test_models_and_health(client: openai.OpenAI, address: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert httpx.get(f"{address}/health").json()["status"] == "ok"


def test_a_full_queue_refuses_and_every_other_request_is_answered(address: str) -> None:
    statuses: list[int] = []

    def ask(index: int) -> None:
        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200, "temperature": 1.0, "seed": index}
        headers = {"Authorization": "Bearer secret"}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=60)
        statuses.append(answer.status_code)
        assert answer.status_code == 200 or answer.headers["retry-after"] == "1"

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 429}
    assert len(statuses) == 12
    assert statuses.count(200) >= 4
    assert httpx.get(f"{address}/health").json()["in_flight"] == 0


def test_disconnected_client_frees_its_place(client: openai.OpenAI, address: str) -> None:
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=400, stream=True, seed=3)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 30
    while httpx.get(f"{address}/health").json()["in_flight"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_malformed_large_and_unauthorized_requests(address: str) -> None:
    url = f"{address}/v1/chat/completions"
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    assert httpx.post(url, content=b"{nonsense", headers=headers).status_code == 400
    assert httpx.post(url, content=b"x" * 2_000_000, headers=headers).status_code == 413
    assert httpx.post(url, json={"model": "tiny", "messages": MESSAGES}).status_code == 401
    assert httpx.get(f"{address}/health").status_code == 200


def test_bad_artefact_and_port_give_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli.body, [str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert run_command(cli.body, [str(tmp_path), "--port", "0"]) == 2
    assert "--port 0: must be between 1 and 65535" in capsys.readouterr().err
