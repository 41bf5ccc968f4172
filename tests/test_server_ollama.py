"""Ollama's API over HTTP: the same answers as OpenAI's, whole and as JSON lines."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from gguf import GGUFReader
from serving import http_client, loaded_pool, serve, served

from efficientllm.runtime.base.quantities import format_count
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.grammar import GrammarConstraint
from efficientllm.runtime.prompt import ChatPrompt
from efficientllm.server.app import create_app
from efficientllm.server.models.pool import ModelPool
from efficientllm.server.models.pool_options import PoolOptions
from efficientllm.server.options import AppOptions

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
GREEDY = {"temperature": 0, "num_predict": 12, "num_ctx": 2048}
SCHEMA = {
    "type": "object",
    "properties": {"room": {"enum": ["den", "hall"]}},
    "required": ["room"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "set_light", "description": "Set a light.", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def client(artefact: Path) -> Iterator[httpx.Client]:
    with served(artefact, context=1024) as address, http_client(address) as client:
        yield client


def ask(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return the lines of an answer."""
    answer = client.post(f"/api/{path}", json={"model": "tiny:latest", **body})
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_chat_gives_the_answer_of_openai_api(client: httpx.Client) -> None:
    settings = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    expected = client.post("/v1/chat/completions", json=settings).json()
    (whole,) = ask(client, "chat", messages=MESSAGES, options=GREEDY, stream=False, keep_alive="5m")
    assert whole["message"] == {"role": "assistant", "content": expected["choices"][0]["message"]["content"]}
    assert (whole["done"], whole["done_reason"], whole["model"]) == (True, "length", "tiny")
    usage = expected["usage"]
    assert (whole["prompt_eval_count"], whole["eval_count"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert whole["total_duration"] >= whole["eval_duration"] > 0
    *lines, last = ask(client, "chat", messages=MESSAGES, options=GREEDY)
    assert "".join(line["message"]["content"] for line in lines) == whole["message"]["content"]
    assert not any(line["done"] or "eval_count" in line for line in lines)
    assert (last["message"]["content"], last["done"], last["eval_count"]) == ("", True, 12)


def test_the_oldest_turns_of_a_long_conversation_are_dropped(client: httpx.Client) -> None:
    turns = [{"role": "user", "content": "one " * 165}, {"role": "assistant", "content": "Yes"}] * 6

    def counted(*messages: dict[str, str], limit: int = 12) -> int:
        (answer,) = ask(client, "chat", messages=messages, options={"num_predict": limit}, stream=False)
        return answer["prompt_eval_count"]

    expected = counted(MESSAGES[0], *turns[-4:], MESSAGES[1])
    long = [MESSAGES[0], *turns, MESSAGES[1]]
    assert counted(*long) == expected > 1024 - counted(turns[0])  # so no third turn fits
    assert counted({"role": "assistant", "content": "Hi " * 900}, MESSAGES[1]) == counted(MESSAGES[1])
    nearly = MESSAGES[1], turns[1], {"role": "user", "content": "one " * 430}
    assert counted(*nearly) > counted(*nearly, limit=500) == counted(nearly[-1])  # of 1024 tokens, 128 are left
    long_last = {"role": "user", "content": "one " * 475}  # which alone leaves no room for 60 tokens
    assert counted(MESSAGES[1], turns[1], long_last, limit=60) > counted(long_last, limit=60) > 1024 - 60
    body = {"model": "tiny", "input": long, "max_output_tokens": 12}
    assert client.post("/v1/responses", json=body).json()["error"]["code"] == "context_length_exceeded"
    answered = client.post("/v1/responses", json={**body, "truncation": "auto"}).json()
    assert (answered["truncation"], answered["usage"]["input_tokens"]) == ("auto", expected)
    for refused in ({"messages": long, "truncate": False}, {"messages": [{"role": "user", "content": "word " * 2000}]}):
        assert client.post("/api/chat", json={"model": "tiny", **refused}).status_code == 400


@pytest.mark.parametrize("raw", [False, True])
def test_a_prompt_is_continued_or_asked(client: httpx.Client, raw: bool) -> None:
    if raw:
        settings = {"model": "tiny", "prompt": "Hello", "temperature": 0, "max_tokens": 12}
        expected = client.post("/v1/completions", json=settings).json()["choices"][0]["text"]
    else:
        settings = {"model": "tiny", "messages": [MESSAGES[0], {"role": "user", "content": "Hello"}]}
        answer = client.post("/v1/chat/completions", json={**settings, "temperature": 0, "max_tokens": 12}).json()
        expected = answer["choices"][0]["message"]["content"]
    asked = {"prompt": "Hello", "options": GREEDY, **({"raw": True} if raw else {"system": "Be brief."})}
    (whole,) = ask(client, "generate", **asked, stream=False)
    assert whole["response"] == expected
    assert "message" not in whole
    assert "".join(line["response"] for line in ask(client, "generate", **asked)) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_may_be_json(client: httpx.Client, stream: bool) -> None:
    lines = ask(client, "chat", messages=MESSAGES, format=SCHEMA, options={"temperature": 0}, stream=stream)
    assert json.loads("".join(line["message"]["content"] for line in lines))["room"] in ("den", "hall")
    lines = ask(client, "generate", prompt="a", raw=True, format=SCHEMA, options={"temperature": 0}, stream=stream)
    assert json.loads("".join(line["response"] for line in lines))["room"] in ("den", "hall")


TEXTS = {"type": "array", "items": {"type": "string"}}
AI_TASK_FIELDS: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "texts": TEXTS,
    "boolean": {"type": "boolean"},
    "number": {"type": "number", "minimum": 0, "maximum": 100},
    "select": {"type": "string", "enum": ["red", "blue"]},
    "select multiple": {"type": "array", "items": {"type": "string", "enum": ["red", "blue"]}, "uniqueItems": True},
    "entity": {"type": "string", "format": "entity_id"},
    "entity multiple": {"type": "array", "items": {"type": "string", "format": "entity_id"}},
    "country": {"type": "string", "format": "ISO 3166-1 alpha-2"},
    "language": {"type": "string", "format": "RFC 5646"},
    "template": {"type": "string", "format": "jinja2"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "color": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3, "format": "RGB"},
    "object": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
    "target": {"type": "object", "properties": {"entity_id": {"anyOf": [{"format": "entity_id"}, TEXTS]}}},
}
"""Kinds of fields of Home Assistant's AI Task, as its `selector_serializer` describes them."""


@pytest.mark.parametrize("kind", AI_TASK_FIELDS)
def test_format_accepts_kind_of_ai_task_field(client: httpx.Client, kind: str) -> None:
    format = {"type": "object", "properties": {"value": AI_TASK_FIELDS[kind]}, "required": ["value"]}
    options = {"temperature": 1, "seed": 1, "num_predict": 60}
    (answer,) = ask(client, "chat", messages=MESSAGES, format=format, options=options, stream=False)
    assert answer["message"]["content"].lstrip().startswith("{")
    if answer["done_reason"] == "stop":
        assert json.loads(answer["message"]["content"]).keys() == {"value"}


def test_format_ends_time_with_many_digits(client: httpx.Client) -> None:
    """The digits are the likeliest tokens."""
    digits = {str(number): 100 for number in client.post("/tokenize", json={"content": "0123456789"}).json()["tokens"]}
    format = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "format": "time"}}}
    body = {"messages": MESSAGES, "response_format": format, "logit_bias": digits, "temperature": 0, "max_tokens": 60}
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert len(json.loads(choice["message"]["content"])) <= 24


def test_format_closes_objects(client: httpx.Client) -> None:
    part = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    format = {"type": "object", "properties": {"part": {"$ref": "#/$defs/part"}}, "$defs": {"part": part}}
    format["required"] = ["part"]
    for seed in range(6):
        options = {"temperature": 2, "seed": seed, "num_predict": 60}
        (answer,) = ask(client, "chat", messages=MESSAGES, format=format, options=options, stream=False)
        assert answer["done_reason"] == "stop"
        assert json.loads(answer["message"]["content"])["part"].keys() == {"a"}


def test_calls_are_objects_of_the_last_line(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grammar must call, because a random model would not."""
    constraint = ChatPrompt.constraint

    def must_call(prompt: ChatPrompt, engine: EngineScheduler) -> GrammarConstraint | None:
        use = prompt.tool_use
        return constraint(replace(prompt, tool_use=replace(use, must_call=True)) if use else prompt, engine)

    monkeypatch.setattr(ChatPrompt, "constraint", must_call)
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "set_light", "arguments": {"room": "den"}}}]}
    messages = [*MESSAGES, called, {"role": "tool", "tool_name": "set_light", "content": "done"}, MESSAGES[1]]
    for stream in (False, True):
        *lines, last = ask(client, "chat", messages=messages, tools=[TOOL], options={"temperature": 0}, stream=stream)
        assert not any("tool_calls" in line["message"] for line in lines)
        assert last["message"]["tool_calls"]
        for call in last["message"]["tool_calls"]:
            assert call["function"]["name"] == "set_light"
            assert call["function"]["arguments"]["room"] in ("den", "hall")


def test_models_are_listed_and_shown(client: httpx.Client) -> None:
    assert client.get("/api/version").json()["version"]
    assert client.head("/api/tags").status_code == 200
    assert client.get("/api/ps").json()["models"][0]["context_length"] == 1024
    (card,) = client.get("/api/tags").json()["models"]
    assert (card["name"], card["model"], len(card["digest"])) == ("tiny:latest", "tiny:latest", 64)
    assert card["size"] > 1000
    shown = client.post("/api/show", json={"model": card["name"]}).json()
    assert shown["capabilities"] == ["completion", "tools"]
    assert 1024 in shown["model_info"].values()
    (loaded,) = ask(client, "generate")
    assert loaded.items() >= {"model": "tiny:latest", "response": "", "done": True, "done_reason": "load"}.items()
    assert ask(client, "chat", messages=[])[0]["message"] == {"role": "assistant", "content": ""}


def test_details_come_from_manifest_or_header(artefact: Path, tmp_path: Path) -> None:
    bare = shutil.copy(artefact / "model.gguf", tmp_path / "bare.gguf")
    pool = ModelPool({"made": str(artefact), "bare": str(bare)}, EngineOptions(threads=1))
    with TestClient(create_app(pool, AppOptions())) as client:
        made, found = (card["details"] for card in client.get("/api/tags").json()["models"])
        shown = client.post("/api/show", json={"model": "bare"}).json()
    fields = ("format", "family", "parameter_size", "quantization_level")
    stored = sum(int(tensor.n_elements) for tensor in GGUFReader(bare).tensors)
    exported = Manifest.read(artefact).architecture["num_parameters"]
    assert [made[name] for name in fields] == ["gguf", "llama", format_count(exported), "F32"]
    assert [found[name] for name in fields] == ["gguf", "deci", format_count(stored), "F32"]
    assert shown["model_info"]["general.parameter_count"] == stored


def test_embeddings_equal_those_of_openai_api(client: httpx.Client) -> None:
    expected = client.post("/v1/embeddings", json={"input": ["Hello", "there"]}).json()
    (found,) = ask(client, "embed", input=["Hello", "there"], truncate=True)
    assert found["embeddings"] == [each["embedding"] for each in expected["data"]]
    assert found["prompt_eval_count"] == expected["usage"]["prompt_tokens"]
    assert ask(client, "embed", input="Hello")[0]["embeddings"] == found["embeddings"][:1]
    assert ask(client, "embed", input="a " * 2000)[0]["prompt_eval_count"] == 1024


def until_loaded(client: httpx.Client, names: list[str]) -> None:
    deadline = time.monotonic() + 60
    while [one["name"] for one in client.get("/api/ps").json()["models"]] != names:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_model_is_unloaded_after_keep_alive(artefact: Path) -> None:
    pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=256))
    with serve(pool, AppOptions()) as address, http_client(address) as client:
        (running,) = client.get("/api/ps").json()["models"]
        assert running["size"] > client.get("/api/tags").json()["models"][0]["size"]
        assert running["expires_at"] > "2050"
        ask(client, "generate", prompt="Hello", options=GREEDY, keep_alive="1h30m")
        assert 5000 < pool.expires_in("tiny") <= 5400
        ask(client, "generate", prompt="Hello", options=GREEDY, keep_alive="50ms")
        until_loaded(client, [])
        ask(client, "chat", messages=MESSAGES, options=GREEDY, keep_alive=-1)  # loads it again
        until_loaded(client, ["tiny:latest"])
        assert ask(client, "generate", keep_alive=0)[0]["done_reason"] == "unload"
        until_loaded(client, [])
        assert ask(client, "chat", messages=[], keep_alive="0")[0]["done_reason"] == "unload"
        until_loaded(client, [])
        ask(client, "generate", prompt="Hello", options=GREEDY)
        assert pool.expires_in("tiny") == float("inf")  # an earlier 0 has ended


def test_a_flag_unloads_idle_models_and_requests_load_them_again(artefact: Path) -> None:
    with served(artefact, limits=PoolOptions(idle_unload=0.05), context=256) as address, http_client(address) as client:
        texts = set[str]()
        for _ in range(3):
            texts.add(ask(client, "generate", prompt="Hello", options=GREEDY)[0]["response"])
            until_loaded(client, [])
        assert len(texts) == 1


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("chat", {"model": "other", "messages": MESSAGES}, 404, "model 'other' does not exist"),
        ("show", {"model": "other"}, 404, "model 'other' does not exist"),
        ("chat", {"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, 400, "images is not served here"),
        ("chat", {"messages": MESSAGES, "options": {"temperature": 3}}, 400, "temperature: Input should be less than"),
        ("chat", {"messages": MESSAGES, "keep_alive": "soon"}, 400, "keep_alive: Input should be a valid number"),
        ("embed", {"input": ""}, 400, "input: must not be empty"),
        ("embed", {"input": "a " * 2000, "truncate": False}, 400, "input: is too large"),
        ("generate", {"prompt": "a", "context": [1, 2]}, 400, "context is not served here"),
        ("generate", {"prompt": "a", "suffix": "b"}, 400, "suffix is not served here; remove it"),
        ("generate", {"prompt": "a", "raw": True, "system": "b"}, 400, "raw: has no chat template for system"),
        ("chat", {"messages": MESSAGES, "think": True}, 400, "knows no reasoning; remove reasoning_effort or think"),
        ("generate", {"prompt": "a " * 2000}, 400, "context window"),
    ],
)
def test_errors_have_the_shape_of_ollama(
    client: httpx.Client, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    answer = client.post(f"/api/{path}", json={"model": "tiny", **body})
    assert answer.status_code == status
    assert message in answer.json()["error"]
