"""What a server owes its clients when others want more: time, turns, memory, reasons; and nothing is ignored."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving import free_port, loaded_pool, post, serve, served

from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.runtime.generation import token_logprob
from efficientllm.runtime.grammar import Grammar, GrammarConstraint
from efficientllm.runtime.sampling import SamplingDefaults, SamplingOptions, log_softmax
from efficientllm.server.access.connections import GracefulServer, limited_protocol
from efficientllm.server.app import create_app
from efficientllm.server.cli import bind_socket
from efficientllm.server.models.pool import ModelPool
from efficientllm.server.models.pool_options import PoolOptions
from efficientllm.server.models.worker import EngineWorker
from efficientllm.server.options import AppOptions
from efficientllm.server.schemas.api_error import APIError

MESSAGES = [{"role": "user", "content": "Hi"}]
LONG: dict[str, Any] = {"max_tokens": 100_000, "temperature": 1, "seed": 3, "logit_bias": {"50": 100, "51": 100}}
"""An answer that neither an end token nor one token's repetition ends."""


@pytest.fixture(scope="module")
def address(artefact: Path) -> Iterator[str]:
    with served(artefact, AppOptions(overflow="slide"), parallel=2, context=4096) as address:
        yield address


def test_single_request_overtakes_fifty_choices(address: str) -> None:
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
    pool = loaded_pool(dict.fromkeys("ab", str(artefact)), options, PoolOptions(timeout=0.3))
    cache = pool.loaded["a"].engine.kv_cache_bytes
    pool.limits = replace(pool.limits, max_memory=2 * size + cache)  # both files, and the caches of one

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
    limits = PoolOptions(timeout=1.0, max_memory=Artefact.open(artefact).file_bytes)
    pool = loaded_pool(dict.fromkeys("ab", str(artefact)), EngineOptions(threads=1, context=64), limits)

    async def go() -> None:
        worker = await pool.enter("a", pool.deadline())
        began = time.monotonic()
        found = await asyncio.gather(*(pool.enter("b", pool.deadline()) for _ in range(4)), return_exceptions=True)
        assert [getattr(each, "status", None) for each in found] == [503] * 4
        assert time.monotonic() - began < 3.0  # not one after the other
        worker.leave()
        pool.close()

    asyncio.run(asyncio.wait_for(go(), 30))


def test_server_accepts_answers_in_the_history(address: str) -> None:
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


ONE_VALUE = {"type": "object", "properties": {"a": {"enum": ["Paris"]}}, "required": ["a"]}
PARIS = [{"type": "function", "function": {"name": "f", "parameters": {**ONE_VALUE, "additionalProperties": False}}}]


def test_a_stop_cuts_no_call_that_must_be_made(address: str) -> None:
    answer = post(address, messages=MESSAGES, max_tokens=100, tools=PARIS, tool_choice="required", stop=["aris"])
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": "Paris"}


def test_a_stop_cuts_no_call_that_may_be_made(address: str) -> None:
    (opening,) = httpx.post(f"{address}/tokenize", json={"content": "<"}).json()["tokens"]
    otherwise = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}  # so it begins with < or {
    body: dict[str, Any] = {"tools": PARIS, "response_format": otherwise, "logit_bias": {str(opening): 100}}
    body |= {"parallel_tool_calls": False, "max_tokens": 300}  # one call, and room for the blanks of any seed
    answer = post(address, messages=MESSAGES, stop=["aris", "<"], **body).json()["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": "Paris"}
    assert answer["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": MESSAGES, "stream_options": {"include_usage": False}, "n": 1.0}),
        ("responses", {"input": "x", "reasoning": {"effort": None}, "top_logprobs": 0, "stream_options": {}}),
    ],
)
def test_server_accepts_fields_without_effect(address: str, path: str, body: dict[str, Any]) -> None:
    limit = "max_output_tokens" if path == "responses" else "max_tokens"
    assert post(address, path, **body, **{limit: 2}).status_code == 200


def two_models(artefact: Path, timeout: float) -> ModelPool:
    """Of which one has room."""
    options = EngineOptions(threads=1, context=512, parallel=1)
    limits = PoolOptions(waiting=1, timeout=timeout, max_memory=Artefact.open(artefact).file_bytes)
    return loaded_pool(dict.fromkeys("ab", str(artefact)), options, limits)


def test_client_that_stops_waiting_loads_no_model(artefact: Path) -> None:
    pool = two_models(artefact, timeout=30)

    async def go() -> None:
        held = await pool.enter("a", pool.deadline())
        gone = [asyncio.ensure_future(pool.enter("b", pool.deadline())) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(APIError, match="busy"):
            await pool.enter("b", pool.deadline())
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)
        assert pool.in_flight == 1
        held.leave()
        (await pool.enter("a", pool.deadline())).leave()
        assert set(pool.loaded) == {"a"}
        (await pool.enter("b", pool.deadline())).leave()
        pool.close()

    asyncio.run(asyncio.wait_for(go(), 60))


def test_started_load_ends_without_clients(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, may_end, has_begun = two_models(artefact, timeout=30), threading.Event(), threading.Event()
    load = pool._load

    def slow(name: str) -> EngineWorker:
        has_begun.set()
        may_end.wait(30)
        return load(name)

    monkeypatch.setattr(pool, "_load", slow)

    async def go() -> None:
        entering = asyncio.ensure_future(pool.enter("b", pool.deadline()))
        await asyncio.to_thread(has_begun.wait)
        entering.cancel()
        await asyncio.sleep(0.05)
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert set(pool.loaded) == {"b"}
        assert not pool.in_flight
        pool.close()

    asyncio.run(asyncio.wait_for(go(), 60))


def test_a_loaded_model_is_entered_while_another_one_loads(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions(threads=1, context=64)
    pool = loaded_pool(dict.fromkeys("ab", str(artefact)), options, PoolOptions(timeout=30))
    load, may_end = pool._load, threading.Event()
    monkeypatch.setattr(pool, "_load", lambda name: load(name) if may_end.wait(30) else None)

    async def go() -> None:
        entering = asyncio.ensure_future(pool.enter("b", pool.deadline()))
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            (await pool.enter("a", pool.deadline())).leave()
        assert not entering.done()
        may_end.set()
        (await entering).leave()
        pool.close()

    asyncio.run(asyncio.wait_for(go(), 60))


def test_stopping_server_answers_waiting_clients(artefact: Path) -> None:
    pool = two_models(artefact, timeout=30)

    async def go() -> None:
        held = await pool.enter("a", pool.deadline())
        waiting = [asyncio.ensure_future(pool.enter("b", pool.deadline())) for _ in range(2)]
        await asyncio.sleep(0.05)
        pool.abort()
        for one in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(one, APIError)
            assert one.status == 503
            assert "the server stops" in str(one)
        with pytest.raises(APIError, match="the server stops"):
            await held.prepare(lambda: time.sleep(0.2), pool.deadline())
        pool.close()

    asyncio.run(asyncio.wait_for(go(), 60))


def test_a_grammar_is_compiled_once_for_all_answers(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    make = GrammarConstraint.__init__

    def count(self: GrammarConstraint, engine: Any, grammar: Grammar, *more: Any) -> None:
        compiled.append(grammar.source)
        make(self, engine, grammar, *more)

    monkeypatch.setattr(GrammarConstraint, "__init__", count)
    form = {"type": "regex", "regex": "[ab]{4}"}
    answer = post(address, messages=MESSAGES, n=4, max_tokens=10, seed=1, response_format=form)
    texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
    assert all(len(text) == 4 and set(text) <= set("ab") for text in texts)
    assert len(set(texts)) > 1
    assert len(compiled) == 1


def test_a_compilation_that_takes_too_long_is_given_up_and_keeps_its_place(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    make = GrammarConstraint.__init__

    def wait(self: GrammarConstraint, *given: Any) -> None:
        may_end.wait(30)
        make(self, *given)

    monkeypatch.setattr(GrammarConstraint, "__init__", wait)
    options = EngineOptions(threads=1, parallel=1, context=512)
    pool = loaded_pool({"tiny": str(artefact)}, options, PoolOptions(waiting=0, timeout=0.3))
    body = {"messages": MESSAGES, "max_tokens": 4}
    with serve(pool, AppOptions()) as address:
        answer = post(address, **body, response_format={"type": "regex", "regex": "[ab]{4}"})
        assert answer.status_code == 408
        assert post(address, **body).status_code == 429
        may_end.set()
        while httpx.get(f"{address}/health").json()["in_flight"]:
            time.sleep(0.01)
        assert post(address, **body).status_code == 200


def test_offsets_continue_from_piece_to_piece(address: str) -> None:
    answer = post(address, "completions", prompt="x", logprobs=1, stream=True, **{**LONG, "max_tokens": 6})
    choices = [json.loads(line[6:])["choices"][0] for line in answer.text.splitlines() if line.startswith("data: {")]
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
    offsets = [offset for choice in choices if choice["logprobs"] for offset in choice["logprobs"]["text_offset"]]
    assert len(offsets) > 2
    assert offsets == [sum(map(len, tokens[:index])) for index in range(len(tokens))]


def test_log_probabilities_equal_those_of_the_whole_softmax() -> None:
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


def test_flags_give_the_defaults_of_requests() -> None:
    defaults = SamplingDefaults(temperature=0.0, top_k=5)
    assert defaults.fill(SamplingOptions(temperature=None, top_k=None)).temperature == 0.0
    assert defaults.fill(SamplingOptions(temperature=0.7)).temperature == 0.7
    assert defaults.fill(SamplingOptions(temperature=None, top_p=None)).top_p is None


def test_a_named_host_shuts_others_out_of_an_open_server(artefact: Path) -> None:
    pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=64))
    app = create_app(pool, AppOptions(allow_host=("board.example",)))

    async def statuses() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            return [(await client.get(f"http://{name}/health")).status_code for name in NAMES]

    NAMES = ("board.example", "localhost", "evil.example")
    assert asyncio.run(statuses()) == [200, 200, 403]
    pool.close()


def test_a_second_head_that_does_not_come_is_given_up_as_the_first(artefact: Path) -> None:
    pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=64))
    with serve(pool, AppOptions(), http=limited_protocol(4, timeout=0.5)) as address:
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


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_side_gets_its_answer(artefact: Path, stream: bool) -> None:
    pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=256))
    with serve(pool, AppOptions(), http=limited_protocol(4, timeout=20)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            content = json.dumps({"messages": MESSAGES, "max_tokens": 150, "temperature": 0, "stream": stream}).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            connection.shutdown(socket.SHUT_WR)
            data = b""
            while more := connection.recv(4096):  # the server closes it after the answer
                data += more
    assert b"HTTP/1.1 200 OK" in data
    assert data.startswith(b"HTTP/1.1 100 Continue")
    assert b'"finish_reason"' in data


def test_server_notices_a_closed_connection_soon(artefact: Path) -> None:
    pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=4096))
    with serve(pool, AppOptions(overflow="slide"), http=limited_protocol(4, timeout=20)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            content = json.dumps({"messages": MESSAGES, **LONG}).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            while not pool.in_flight:
                time.sleep(0.001)
        deadline = time.monotonic() + 30
        while pool.in_flight:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@contextlib.contextmanager
def stopping_server(artefact: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own that gives answers one second; its process and address."""
    command = [sys.executable, "-m", "efficientllm.runtime.start", "serve", str(artefact), "--threads", "1"]
    port = free_port()
    command += ["--port", str(port), "--grace", "1", "--overflow", "slide", "--context", "256"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        server.stdout.readline()
        address = f"http://127.0.0.1:{port}"
        for _ in range(200):
            try:
                httpx.get(f"{address}/health")
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield server, address
        assert server.wait(timeout=30) == -signal.SIGTERM  # as uvicorn ends
        assert "Traceback" not in server.stderr.read()


def test_answers_that_outlast_the_grace_end_with_a_reason(artefact: Path) -> None:
    with stopping_server(artefact) as (server, address):
        body = {"model": Artefact.open(artefact).path.name, "messages": MESSAGES, "stream": True, **LONG}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server stops"


def test_service_reports_start_and_stop_to_systemd(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with stopping_server(artefact) as (server, address):
            assert manager.recv(64) == b"READY=1"
            assert httpx.get(f"{address}/health").status_code == 200
            server.send_signal(signal.SIGTERM)
            assert manager.recv(64) == b"STOPPING=1"


def test_a_server_that_stops_does_not_wait_for_a_grammar(artefact: Path) -> None:
    patterns = [{"type": "string", "pattern": f"^[a-z]{{1,{n}}}x[0-9]{{2,50}}$"} for n in range(50, 90)]
    schema = {"allOf": patterns}  # what all of them match takes half a minute to find
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    body = {"model": Artefact.open(artefact).path.name, "messages": MESSAGES, "response_format": form}
    with stopping_server(artefact) as (server, address), concurrent.futures.ThreadPoolExecutor() as threads:
        answer = threads.submit(httpx.post, f"{address}/v1/chat/completions", json=body, timeout=60)
        while not httpx.get(f"{address}/health").json()["in_flight"]:
            assert not answer.done()
        server.send_signal(signal.SIGTERM)
        assert answer.result().status_code == 503
        assert answer.result().json()["error"]["message"] == "the server stops"


def test_a_server_closes_no_log_handler_of_its_program(artefact: Path) -> None:
    class Handler(logging.NullHandler):
        is_closed = False

        def close(self) -> None:
            self.is_closed = True
            super().close()

    handler = Handler()
    pool = ModelPool({"tiny": str(artefact)}, EngineOptions(threads=1, context=64, parallel=1))
    GracefulServer(create_app(pool), pool.load_first, pool.abort, 1, log_level="error")
    assert not handler.is_closed


@contextlib.contextmanager
def loading_server(pool: ModelPool) -> Iterator[tuple[GracefulServer, str]]:
    """A server in a thread that listens, though its model may not be loaded yet; and its address."""
    with bind_socket("127.0.0.1", 0) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = GracefulServer(create_app(pool), pool.load_first, pool.abort, 1, log_level="error")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield server, address
        finally:
            server.should_exit = True
            thread.join(timeout=20)
        assert not thread.is_alive()


def delayed_pool(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelPool, threading.Event]:
    """A pool that loads its model after the event."""
    load, may_load = ModelPool._load, threading.Event()

    def wait(pool: ModelPool, name: str) -> EngineWorker:
        assert may_load.wait(20)
        return load(pool, name)

    monkeypatch.setattr(ModelPool, "_load", wait)
    options = EngineOptions(threads=1, context=64, parallel=1)
    return ModelPool({"tiny": str(artefact)}, options), may_load


def test_a_server_listens_before_its_model_is_loaded(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, may_load = delayed_pool(artefact, monkeypatch)
    with loading_server(pool) as (_, address), concurrent.futures.ThreadPoolExecutor() as threads:
        health = httpx.get(f"{address}/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "tiny"
        answer = threads.submit(post, address, messages=MESSAGES, max_tokens=2)
        while not httpx.get(f"{address}/health").json()["in_flight"]:
            assert not answer.done()
        may_load.set()
        assert answer.result().status_code == 200
        health = httpx.get(f"{address}/health")
        assert (health.status_code, health.json()["status"]) == (200, "ok")


def test_a_server_that_stops_does_not_wait_for_its_first_load(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, may_load = delayed_pool(artefact, monkeypatch)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        with loading_server(pool) as (server, address):
            answer = threads.submit(post, address, messages=MESSAGES)
            while not httpx.get(f"{address}/health").json()["in_flight"]:
                assert not answer.done()
            server.should_exit = True
            assert answer.result().status_code == 503
        may_load.set()


def test_a_server_ends_if_its_first_model_cannot_be_loaded(artefact: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(artefact, tmp_path / "damaged")
    with next(damaged.glob("*.gguf")).open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"!!!!")
    command = [sys.executable, "-m", "efficientllm.runtime.start", "serve", str(damaged), "--port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "damaged" in done.stderr
    assert done.stderr.count("\n") == 1
