"""Requests of well-known clients, replayed: each is answered, in the form that its client reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from recorded_requests import RECORDED
from serving import served

SLOW = ("aider, Ollama",)
"""Answers that only end with the context window."""


@pytest.fixture(scope="module")
def client(artefact: Path) -> Iterator[httpx.Client]:
    with served(artefact, context=2048, parallel=4) as address, httpx.Client(base_url=address, timeout=120) as client:
        yield client


def check_events(path: str, text: str) -> None:
    """Check the server-sent events of an answer, up to the one that ends it."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if path.startswith("/v1/") and path != "/v1/responses":
        assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    assert not any("error" in event for event in events if event.get("error"))
    if path == "/v1/responses":
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert (events[0]["type"], events[-1]["type"].partition(".")[0]) == ("response.created", "response")
        assert events[-1]["response"]["status"] in ("completed", "incomplete")
    elif path == "/completion":
        assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    else:
        reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
        assert reasons[-1] in ("stop", "length", "tool_calls")
        assert not any(reasons[:-1])


def check_lines(text: str) -> None:
    """Check the JSON lines of Ollama's API."""
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["done_reason"] in ("stop", "length")
    assert all("message" in line or "response" in line for line in lines)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RECORDED]
)
def test_a_recorded_request_is_answered(client: httpx.Client, name: str) -> None:
    path, body = RECORDED[name]
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    kind = answer.headers["content-type"].partition(";")[0]
    if kind == "text/event-stream":
        check_events(path, answer.text)
    elif kind == "application/x-ndjson" and body.get("stream"):
        check_lines(answer.text)
    else:
        found: dict[str, Any] = answer.json()
        (items,) = (found[key] for key in ("choices", "data", "embeddings") if key in found)
        assert items


def test_a_structured_answer_follows_the_schema_of_the_client(client: httpx.Client) -> None:
    """Home Assistant's tasks have the keyword strict in the schema itself."""
    path, body = RECORDED["Home Assistant, ollama, a task"]
    lines = [json.loads(line) for line in client.post(path, json={**body, "stream": True}).text.splitlines()]
    task = json.loads("".join(line["message"]["content"] for line in lines))
    assert task["room"] in ("den", "hall")
    assert task.keys() == {"room", "note"}


@pytest.mark.parametrize("path", ["/v1/models", "/api/tags", "/api/version", "/api/ps", "/props", "/health"])
def test_server_answers_first_requests_of_clients(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, bool(answer.json())) == (200, True)
