"""Requests that no answer fits, or whose conditions are too large to be followed: refused, and nothing else suffers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import serve

from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.app import AppOptions
from efficientllm.server.models.pool import ModelPool

CHAIN = 3000
"""References, one to the next: as many end a process in llguidance 1.x."""


@pytest.fixture(scope="module")
def address(artefact: Path) -> Iterator[str]:
    pool = ModelPool({"tiny": str(artefact)}, EngineOptions(threads=1, parallel=2, context=512))
    with serve(pool, AppOptions()) as address:
        yield address


def ask(address: str, body: dict[str, Any], path: str = "chat/completions") -> httpx.Response:
    asked = (
        {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4} if "chat" in path else {}
    )
    content = json.dumps({"model": "tiny", **asked, **body})  # surrogates and all
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{address}/v1/{path}", content=content.encode(), headers=headers, timeout=60)


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": value}}}


def lark(text: str) -> dict[str, Any]:
    return {"response_format": {"type": "lark", "lark": text}}


def chain() -> dict[str, Any]:
    definitions: dict[str, Any] = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(CHAIN)}
    return {"$defs": {**definitions, f"d{CHAIN}": {"type": "string"}}, "$ref": "#/$defs/d0"}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {**chain(), "type": "object"}}}
RULES = "\n".join(f'a{n}: a{n + 1} | "x"' for n in range(CHAIN))

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a chain of references": (schema(chain()), "references or rules, at most 500 are taken"),
    "a chain in a tool": ({"tools": [TOOL], "tool_choice": "required"}, "references or rules, at most 500 are taken"),
    "a chain of rules": (lark(f'start: a0\n{RULES}\na{CHAIN}: "y"'), "references or rules, at most 500 are taken"),
    "half a character": (schema({"const": "\ud800"}), "json_schema: "),
    "a number of 400 digits": (schema({"type": "integer", "maximum": 10**400}), "json_schema: "),
    "a schema of itself": (schema({"$ref": "#"}), "the grammar fails: "),
    "a regex that nothing matches": (
        {"response_format": {"type": "regex", "regex": r"[^\s\S]"}},
        "the grammar fails: ",
    ),
    "a rule of itself": (lark('start: start "a"'), "the grammar fails: "),
    "every token forbidden": ({"logit_bias": {str(n): -100 for n in range(400)}}, "forbids every token"),
    "a field of half a character": ({"\ud800": 1}, "\\ud800 is not served here"),
    "a field of a megabyte": ({"x" * 900_000: 1}, "xxx"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_and_the_server_goes_on(address: str, name: str) -> None:
    body, said = REFUSED[name]
    answer = ask(address, body)
    assert answer.status_code == 400, answer.text[:300]
    message = answer.json()["error"]["message"]
    assert said in message
    assert len(message) < 2100
    assert ask(address, {}).status_code == 200
    assert httpx.get(f"{address}/health").json()["in_flight"] == 0


def test_a_call_whose_arguments_are_a_hundred_thousand_brackets(address: str) -> None:
    function = {"name": "f", "arguments": '{"a":' + "[" * 90_000}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    messages = [{"role": "user", "content": "Hi"}, call, {"role": "tool", "tool_call_id": "1", "content": "x"}]
    answer = ask(address, {"messages": messages})
    assert answer.status_code == 400
    assert "must be a JSON object" in answer.json()["error"]["message"]


def test_a_schema_that_goes_with_nothing_is_not_ignored(address: str) -> None:
    format = {"type": "json_object", "schema": {"const": {"a": 1}}}
    answer = ask(address, {"input": "Hi", "text": {"format": format}}, "responses")
    assert answer.status_code == 400
    assert "schema: goes with type json_schema" in answer.json()["error"]["message"]
