"""Anthropic's API over HTTP: the same answers as OpenAI's, as blocks, whole and as events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import loaded_pool, serve
from test_server_ollama import SCHEMA
from test_server_reasoning import TEMPLATE, answer_with

from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.models.pool import ModelPool
from efficientllm.server.options import AppOptions

MESSAGES = [{"role": "user", "content": "Hello there"}]
TOOL = {"name": "set_light", "description": "Set a light.", "input_schema": SCHEMA}
GREEDY = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def pool(artefact: Path) -> ModelPool:
    return loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=1024))


@pytest.fixture(scope="module")
def client(pool: ModelPool) -> Iterator[httpx.Client]:
    headers = {"x-api-key": "secret", "anthropic-version": "2023-06-01"}
    options = AppOptions(api_key="secret")
    with serve(pool, options) as address, httpx.Client(base_url=address, timeout=60, headers=headers) as client:
        yield client


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/messages", json={"model": "tiny", "messages": MESSAGES, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(client: httpx.Client, **body: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the blocks that the events describe and the last message_delta."""
    text = client.post("/v1/messages", json={"model": "tiny", "messages": MESSAGES, "stream": True, **body}).text
    blocks, last, kinds, written = list[dict[str, Any]](), dict[str, Any](), list[str](), dict[int, str]()
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        kinds.append(value["type"])
        if value["type"] == "content_block_start":
            assert value["index"] == len(blocks)
            blocks.append(value["content_block"])
        elif value["type"] == "content_block_delta":
            delta = value["delta"]
            if delta["type"] == "input_json_delta":
                written[value["index"]] = written.get(value["index"], "") + delta["partial_json"]
            else:
                kind = delta["type"].removesuffix("_delta")
                blocks[value["index"]][kind] += delta[kind]
        elif value["type"] == "message_delta":
            last = value
    for index, arguments in written.items():
        blocks[index]["input"] = json.loads(arguments)
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(blocks)
    return blocks, last


def test_messages_api_gives_the_answer_of_openai_api(client: httpx.Client) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    headers = {"Authorization": "Bearer secret"}
    sent = {"model": "tiny", "messages": messages, **GREEDY}
    expected = client.post("/v1/chat/completions", json=sent, headers=headers).json()
    text, usage = expected["choices"][0]["message"]["content"], expected["usage"]
    parts = [
        {"type": "text", "text": "Hello "},
        {"type": "text", "text": "there", "cache_control": {"type": "ephemeral"}},
    ]
    for system, content in (("Be brief.", "Hello there"), ([{"type": "text", "text": "Be brief."}], parts)):
        answer = ask(client, system=system, messages=[{"role": "user", "content": content}], **GREEDY)
        assert answer["content"] == [{"type": "text", "text": text}]
        assert (answer["type"], answer["role"], answer["stop_reason"]) == ("message", "assistant", "max_tokens")
        counts = answer["usage"]
        assert counts["input_tokens"] + counts["cache_read_input_tokens"] == usage["prompt_tokens"]
        assert counts["output_tokens"] == usage["completion_tokens"]
    blocks, last = streamed(client, system="Be brief.", **GREEDY)
    assert blocks == answer["content"]
    assert (last["delta"]["stop_reason"], last["usage"]["output_tokens"]) == ("max_tokens", usage["completion_tokens"])
    counted = client.post(
        "/v1/messages/count_tokens", json={"model": "tiny", "system": "Be brief.", "messages": MESSAGES}
    )
    assert counted.json() == {"input_tokens": usage["prompt_tokens"]}


def test_stop_sequence_is_named(client: httpx.Client) -> None:
    text = ask(client, **GREEDY)["content"][0]["text"]
    stop = text[2:4]
    settings = {**GREEDY, "stop_sequences": ["never said", stop]}
    answer = ask(client, **settings)
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
    assert "".join(block["text"] for block in answer["content"]) == text[: text.index(stop)]
    assert streamed(client, **settings)[1]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stop}
    assert ask(client, **GREEDY)["stop_sequence"] is None


def test_output_config_gives_object_and_strict_tools_refuse(client: httpx.Client) -> None:
    config = {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"}
    answer = ask(client, output_config=config, max_tokens=60, temperature=0)
    assert json.loads(answer["content"][0]["text"])["room"] in ("den", "hall")
    schema = {"type": "object", "properties": {"rooms": {"type": "array", "uniqueItems": True}}}
    for strict, status in ((False, 200), (True, 400)):
        tool = {**TOOL, "input_schema": schema, "strict": strict}
        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, "tools": [tool]}
        assert client.post("/v1/messages", json=body).status_code == status


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "set_light"}])
def test_calls_are_blocks_and_results_continue_the_chat(client: httpx.Client, choice: dict[str, str]) -> None:
    settings = {"tools": [TOOL], "tool_choice": {**choice, "disable_parallel_tool_use": True}, "max_tokens": 200}
    answer = ask(client, **settings, temperature=0)
    (call,) = answer["content"]
    assert (call["type"], call["name"], answer["stop_reason"]) == ("tool_use", "set_light", "tool_use")
    assert call["input"]["room"] in ("den", "hall")
    (block,), last = streamed(client, **settings, temperature=0)
    assert {**block, "id": call["id"]} == call
    assert last["delta"]["stop_reason"] == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "done"}]}
    turns = [*MESSAGES, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}]
    assert ask(client, messages=turns, tools=[TOOL], **GREEDY)["usage"]["output_tokens"] > 0


def test_reasoning_is_a_block(client: httpx.Client, pool: ModelPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.loaded["tiny"].engine, "chat_template", TEMPLATE)
    answer_with(monkeypatch, pool, "<think>\nHm.\n</think>\n\nYes.")
    expected = [{"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "text", "text": "Yes."}]
    settings = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 60}
    answer = ask(client, **settings)
    assert (answer["content"], answer["stop_reason"]) == (expected, "end_turn")
    assert streamed(client, **settings)[0] == expected
    turns = [*MESSAGES, {"role": "assistant", "content": expected}, *MESSAGES]
    assert ask(client, messages=turns, **settings)["content"] == expected


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({"output_config": {"format": {"type": "text"}}}, 400, "invalid_request_error", "output_config.format.type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "messages.0.content.0",
        ),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice: required needs tools"),
        ({"temperature": 3}, 400, "invalid_request_error", "temperature: "),
        ({"mcp_servers": ["x"]}, 400, "invalid_request_error", "mcp_servers is not served here"),
    ],
)
def test_errors_have_the_shape_of_anthropic(
    client: httpx.Client, body: dict[str, Any], status: int, kind: str, message: str
) -> None:
    answer = client.post("/v1/messages", json={"model": "tiny", "messages": MESSAGES, "max_tokens": 3, **body})
    assert (answer.status_code, answer.json()["type"], answer.json()["error"]["type"]) == (status, "error", kind)
    assert message in answer.json()["error"]["message"]


def test_server_accepts_the_key_in_the_header_of_anthropic(client: httpx.Client) -> None:
    sent = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
    assert client.post("/v1/messages", json=sent, headers={"x-api-key": "wrong"}).status_code == 401
    assert client.post("/v1/messages", json=sent).status_code == 200
