"""Clients that hold connections without saying anything do not keep others out."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from pydantic import BaseModel, ValidationError
from serving import loaded_pool, serve

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server import cli
from efficientllm.server.access.connections import limited_protocol
from efficientllm.server.body import read_body
from efficientllm.server.options import AppOptions
from efficientllm.server.schemas.completions import ChatRequest, EmbeddingsRequest, TextRequest
from efficientllm.server.schemas.responses_api import ResponsesRequest

MOST = 8
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


@pytest.fixture(scope="module")
def address(artefact: Path) -> Iterator[str]:
    pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=64))
    with serve(pool, AppOptions(body_timeout=0.5), http=limited_protocol(MOST, timeout=0.5)) as address:
        yield address


@contextlib.contextmanager
def connected(address: str, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connections that have sent `sent` and nothing else."""
    with contextlib.ExitStack() as stack:
        where = urlsplit(address)
        held = []
        for _ in range(count):
            held.append(stack.enter_context(socket.create_connection((where.hostname, where.port), timeout=20)))
            held[-1].sendall(sent)
        yield held


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(4096):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.slow
def test_a_body_that_does_not_come_is_given_up(address: str) -> None:
    with connected(address, 1, HEAD + b'{"model"') as (connection,):
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"the body did not arrive within 0.5 s" in answer


def test_server_closes_silent_connections(address: str) -> None:
    with connected(address, 1) as (silent,), connected(address, 1, HEAD[:30]) as (slow,):
        assert received(silent) == received(slow) == b""


@pytest.mark.slow
def test_server_refuses_connections_beyond_the_limit(address: str) -> None:
    with connected(address, MOST, HEAD) as held:
        time.sleep(0.1)  # they are in the server's books
        with connected(address, 1, HEAD) as (late,):
            assert received(late).startswith(b"HTTP/1.1 503")
        assert all(received(connection).startswith(b"HTTP/1.1 408") for connection in held)
    assert httpx.get(f"{address}/health").json()["status"] == "ok"


def is_served(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:  # the refusal was cut off by the close
        return False


def test_clients_that_read_nothing_are_let_go(address: str) -> None:
    """Their answers fill the buffers of both systems, and closing would wait for them."""
    where = urlsplit(address)
    with contextlib.ExitStack() as stack:
        for _ in range(MOST):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((where.hostname, where.port))
            client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        assert not is_served(address)
        until = time.monotonic() + 15
        while not is_served(address):
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.mark.slow
def test_a_slow_reader_gets_its_whole_answer(address: str) -> None:
    whole = httpx.get(f"{address}/openapi.json").content
    where = urlsplit(address)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((where.hostname, where.port))
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
        read = b""
        while read.count(whole) < 10:
            part = client.recv(1 << 14)
            assert part
            read += part
            time.sleep(0.05)


def test_connections_are_kept_longer_than_clients_use_them(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a request is sent just as its connection is closed."""
    configs: list[uvicorn.Config] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: configs.append(server.config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert run_command(cli.body, [str(artefact), "--port", str(port), "--context", "64"]) == 0
    assert configs[0].timeout_keep_alive > 2 * (httpx.Limits().keepalive_expiry or 0)


HEADERS = {"Content-Type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "stream": True}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}] * 40_000}]},
            "messages.0.content.0",
        ),
        ("completions", {"prompt": [""] * 190_000}, "prompt: "),
        ("completions", {"prompt": [[None] * 190_000]}, "prompt.0.0: "),
        ("embeddings", {"input": [[]] * 190_000}, "input.0: "),
        ("responses", {"input": [{"type": "message", "role": "x", "content": ""}] * 15_000}, "input.0"),
    ],
)
def test_a_large_wrong_body_stops_at_its_first_errors(
    address: str, path: str, body: dict[str, object], message: str
) -> None:
    """pydantic would collect hundreds of thousands of errors, in seconds."""
    read = {"chat/completions": ChatRequest, "completions": TextRequest, "embeddings": EmbeddingsRequest}
    with pytest.raises(ValidationError) as caught:
        read.get(path, ResponsesRequest).model_validate(body)
    assert len(caught.value.errors()) < 10
    answer = httpx.post(f"{address}/v1/{path}", content=json.dumps(body, separators=(",", ":")), headers=HEADERS)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)


def test_bodies_are_read_beside_the_event_loop(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = list[threading.Thread]()
    parse = read_body

    def record(model: type[BaseModel], body: bytes) -> BaseModel:
        threads.append(threading.current_thread())
        with httpx.Client() as client:  # the event loop answers meanwhile
            assert client.get(f"{address}/health").status_code == 200
        return parse(model, body)

    monkeypatch.setattr("efficientllm.server.body.read_body", record)
    assert httpx.post(f"{address}/v1/chat/completions", json=CHAT).status_code == 200
    assert len(threads) == 1


def test_a_refusal_can_be_read_after_the_whole_body_was_sent(address: str) -> None:
    """A client that sends 8 MB and then reads. A server that closes at once resets the connection."""
    head = HEAD.replace(b"Length: 100", b"Length: 8000000")
    with connected(address, 1, head) as (connection,):
        for _ in range(80):
            connection.sendall(b" " * 100_000)
            time.sleep(0.001)
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"the body may have at most 1000000 bytes" in answer


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/api/chat"])
def test_the_head_of_a_stream_is_sent_before_the_first_text(
    artefact: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr("efficientllm.server.models.worker.HEAD_SECONDS", 0.05)
    monkeypatch.setattr("efficientllm.server.models.worker.PING_SECONDS", 0.05)
    pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=64))
    body: dict[str, object] = {**CHAT, "model": "tiny", "input": "Hello", "max_output_tokens": 3}
    used = {"/v1/responses": ("input", "max_output_tokens"), "/api/chat": ("messages",)}
    names = ("model", "stream", *used.get(path, ("messages", "max_tokens")))
    with serve(pool, AppOptions()) as address, httpx.Client() as client:
        turn = pool.loaded["tiny"].engine._turn
        turn.acquire()  # the engine computes for others
        try:
            sent = {name: body[name] for name in names}
            with client.stream("POST", f"{address}{path}", json=sent, timeout=20) as answer:
                assert answer.status_code == 200
                lines, seen = answer.iter_lines(), list[str]()
                while path != "/api/chat" and seen.count(": ping") < 3:
                    seen.append(next(lines))
                turn.release()
                seen += lines
        finally:
            with contextlib.suppress(RuntimeError):
                turn.release()
    last = [line for line in seen if line][-1]
    assert "[DONE]" in last or "response.incomplete" in last or '"done":true' in last
    assert all(line == ": ping" or line.startswith(("data: ", "event: ", "{")) for line in seen if line)
