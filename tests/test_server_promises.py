"""What a server owes its clients when others want more: time, turns, memory, reasons; and nothing is ignored."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving import serve

from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.runtime.generation import token_logprob
from efficientllm.runtime.sampling import SamplingOptions, log_softmax
from efficientllm.server.access.connections import limited_protocol
from efficientllm.server.answers.defaults import SamplingDefaults
from efficientllm.server.app import AppOptions, create_app
from efficientllm.server.models.pool import ModelPool
from efficientllm.server.schemas.error import APIError

MESSAGES = [{"role": "user", "content": "Hi"}]
LONG: dict[str, Any] = {"max_tokens": 100_000, "temperature": 0, "logit_bias": {"0": -100, "2": -100, "50": 100}}
"""An answer that no end token ends."""


@pytest.fixture(scope="module")
def address(artefact: Path) -> Iterator[str]:
    pool = ModelPool({"tiny": str(artefact)}, EngineOptions(threads=1, parallel=2, context=4096))
    with serve(pool, AppOptions(overflow="slide")) as address:
        yield address


def post(address: str, path: str = "chat/completions", **body: Any) -> httpx.Response:
    return httpx.post(f"{address}/v1/{path}", json={"model": "tiny", **body}, timeout=60)


def test_who_asks_for_one_answer_waits_for_none_of_who_asks_for_fifty(address: str) -> None:
    order: list[str] = []

    def ask_for_many() -> None:
        body = {**LONG, "max_tokens": 40, "prompt": [f"a{number}" for number in range(8)], "n": 8}
        assert post(address, "completions", **body).status_code == 200
        order.append("many")

    many = threading.Thread(target=ask_for_many)
    many.start()
    while not httpx.get(f"{address}/health").json()["in_flight"]:
        time.sleep(0.005)
    assert post(address, "completions", prompt="x", max_tokens=1).status_code == 200
    order.append("one")
    many.join()
    assert order == ["one", "many"]


def test_caches_count_against_the_memory_of_all_models(artefact: Path) -> None:
    options = EngineOptions(threads=1, context=2048, parallel=8)
    size = Artefact.open(artefact).file_bytes
    pool = ModelPool(dict.fromkeys("ab", str(artefact)), options, timeout=0.3)
    cache = pool.loaded["a"].engine.kv_cache_bytes
    pool.max_memory = 2 * size + cache  # both files, and the caches of one

    async def go() -> None:
        first = await pool.enter("a", pool.deadline())
        with pytest.raises(APIError) as busy:  # b's caches, which nobody knows before they are there, have no room
            await pool.enter("b", pool.deadline())
        assert busy.value.status == 503
        assert list(pool.loaded) == ["a"]
        first.leave()
        (await pool.enter("b", pool.deadline())).leave()
        assert list(pool.loaded) == ["b"]
        pool.close()

    asyncio.run(asyncio.wait_for(go(), 30))


def test_waiting_for_a_model_counts_as_time_of_the_request(artefact: Path) -> None:
    pool = ModelPool(dict.fromkeys("ab", str(artefact)), EngineOptions(threads=1, context=64), timeout=1.0)
    pool.max_memory = Artefact.open(artefact).file_bytes

    async def go() -> None:
        worker = await pool.enter("a", pool.deadline())
        began = time.monotonic()
        found = await asyncio.gather(*(pool.enter("b", pool.deadline()) for _ in range(4)), return_exceptions=True)
        assert [getattr(each, "status", None) for each in found] == [503] * 4
        assert time.monotonic() - began < 3.0  # not one after the other
        worker.leave()
        pool.close()

    asyncio.run(asyncio.wait_for(go(), 30))


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (
            "chat/completions",
            {"messages": [{**MESSAGES[0], "contents": "x"}]},
            "messages.0: contents is not served here",
        ),
        ("chat/completions", {"stream_options": {"usage": True}}, "stream_options: usage is not served here"),
        (
            "chat/completions",
            {"tools": [{"type": "function", "function": {"name": "f", "params": {"type": "object"}}}]},
            "tools.0.function: params is not served here",
        ),
        (
            "chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"scheme": {"type": "object"}}}},
            "response_format.json_schema: scheme is not served here",
        ),
        ("chat/completions", {"response_format": {"type": "text", "regex": "z"}}, "regex: goes with type regex"),
        ("responses", {"input": [{"role": "user", "content": "x", "cache": 1}]}, "cache is not served here"),
    ],
)
def test_nothing_is_ignored_in_silence(address: str, path: str, body: dict[str, Any], named: str) -> None:
    chat = {"messages": MESSAGES} if path == "chat/completions" else {}
    answer = post(address, path, **{**chat, **body})
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]


def test_what_clients_keep_of_an_answer_may_come_back(address: str) -> None:
    kept = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "reasoning_content": "y",
    }
    assert post(address, messages=[*MESSAGES, kept, *MESSAGES], max_tokens=2).status_code == 200


def test_a_json_object_may_have_a_schema(address: str) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    answer = post(address, messages=MESSAGES, max_tokens=60, response_format={"type": "json_object", "schema": schema})
    assert json.loads(answer.json()["choices"][0]["message"]["content"]) == {"a": 1}


def test_a_stop_cuts_no_call_that_must_be_made(address: str) -> None:
    parameters = {
        "type": "object", "properties": {"a": {"enum": ["Paris"]}}, "required": ["a"], "additionalProperties": False
    }  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    answer = post(address, messages=MESSAGES, max_tokens=100, tools=tools, tool_choice="required", stop=["aris"])
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": "Paris"}


def test_offsets_go_on_from_piece_to_piece(address: str) -> None:
    answer = post(address, "completions", prompt="x", logprobs=1, stream=True, **{**LONG, "max_tokens": 6})
    choices = [json.loads(line[6:])["choices"][0] for line in answer.text.splitlines() if line.startswith("data: {")]
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
    offsets = [offset for choice in choices if choice["logprobs"] for offset in choice["logprobs"]["text_offset"]]
    assert len(offsets) > 2
    assert offsets == [sum(map(len, tokens[:index])) for index in range(len(tokens))]


def test_log_probabilities_are_those_of_the_whole_softmax() -> None:
    logits = np.random.default_rng(0).normal(0, 3, 5000).astype(np.float32)
    expected = log_softmax(logits)
    best = np.argsort(-expected, kind="stable")[:20]
    found = token_logprob(logits, 7, 20)
    assert [token for token, _ in found.top] == best.tolist()
    assert [found.logprob, *(value for _, value in found.top)] == pytest.approx(
        [expected[7], *expected[best]], abs=1e-6
    )
    assert token_logprob(logits, 7, 0).top == ()


def test_many_texts_are_embedded_in_one_request(address: str) -> None:
    answer = post(address, "embeddings", input=[f"text {number}" for number in range(40)])
    assert [each["index"] for each in answer.json()["data"]] == list(range(40))


def test_refusals_are_counted(artefact: Path) -> None:
    pool = ModelPool({"tiny": str(artefact)}, EngineOptions(threads=1, context=64))
    with serve(pool, AppOptions(api_key="secret")) as address:
        assert httpx.get(f"{address}/v1/models").status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{address}/nowhere", headers=key).status_code == 404
        metrics = httpx.get(f"{address}/metrics", headers=key).text
    for status in (401, 404):
        assert f'efficientllm_requests_total{{endpoint="other",status="{status}"}} 1.0' in metrics


def test_what_a_flag_says_holds_where_a_request_says_nothing() -> None:
    defaults = SamplingDefaults(temperature=0.0, top_k=5)
    assert defaults.fill(SamplingOptions(temperature=None, top_k=None)).temperature == 0.0
    assert defaults.fill(SamplingOptions(temperature=0.7)).temperature == 0.7
    assert defaults.fill(SamplingOptions(temperature=None, top_p=None)).top_p is None


def test_a_named_host_shuts_others_out_of_an_open_server(artefact: Path) -> None:
    pool = ModelPool({"tiny": str(artefact)}, EngineOptions(threads=1, context=64))
    app = create_app(pool, AppOptions(allow_host=("board.example",)))

    async def statuses() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            return [(await client.get(f"http://{name}/health")).status_code for name in NAMES]

    NAMES = ("board.example", "localhost", "evil.example")
    assert asyncio.run(statuses()) == [200, 200, 403]
    pool.close()


def test_a_second_head_that_does_not_come_is_given_up_as_the_first(artefact: Path) -> None:
    pool = ModelPool({"tiny": str(artefact)}, EngineOptions(threads=1, context=64))
    with serve(pool, AppOptions(), http=limited_protocol(4, head_timeout=0.5)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(1.0)  # between requests it may be silent for longer
            connection.sendall(b"GET /hea")
            assert connection.recv(4096) == b""


def test_answers_that_outlast_the_grace_end_with_a_reason(artefact: Path) -> None:
    command = [sys.executable, "-m", "efficientllm.server.cli", str(artefact), "--threads", "1", "--grace", "1"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command += ["--port", str(port), "--overflow", "slide", "--context", "256"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        server.stdout.readline()
        body = {"model": Artefact.open(artefact).path.name, "messages": MESSAGES, "stream": True, **LONG}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        for _ in range(200):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.TransportError:
                time.sleep(0.05)
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server stops"
        server.wait(timeout=30)
        assert "Traceback" not in server.stderr.read()
