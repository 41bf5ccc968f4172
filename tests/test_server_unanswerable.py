"""Requests that no answer fits, or whose conditions are too large to be followed: refused, and nothing else suffers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import served


@pytest.fixture(scope="module")
def address(artefact: Path) -> Iterator[str]:
    with served(artefact, parallel=2, context=512) as address:
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


def chain(links: int, nested: int = 0, key: str = "allOf") -> dict[str, Any]:
    """References, one to the next, each some levels deep."""
    definitions: dict[str, Any] = {}
    for link in range(links):
        definition: dict[str, Any] = {"$ref": f"#/$defs/{link + 1}"}
        for _ in range(nested):
            definition = {key: [definition]}
        definitions[str(link)] = definition
    return {"$defs": {**definitions, str(links): {"type": "string"}}, "$ref": "#/$defs/0"}


def rules(links: int, name: str, form: str = "{}") -> str:
    """Of a Lark grammar, one to the next."""
    lines = [f"start: {name}0", *(f"{name}{link}: {form.format(f'{name}{link + 1}')}" for link in range(links))]
    return "\n".join([*lines, f'{name}{links}: "y"'])


LINKS = chain(3900)
PARAMETERS = {"type": "object", "properties": {"a": {"$ref": LINKS["$ref"]}}, "$defs": LINKS["$defs"]}
SMALL = "no output can satisfy this grammar|leaves no room in the context window"
OPTIONAL = "(" * 20 + '{} "b"' + ")?" * 20

DEEP: dict[str, dict[str, Any]] = {
    "references": schema(chain(3900)),
    "references in allOf": schema(chain(480, 18)),
    "references in anyOf": schema(chain(300, 30, "anyOf")),
    "references of a tool": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}],
        "tool_choice": "required",
    },
    "references within Lark": lark(f"start: %json {json.dumps(chain(2800))}".replace("$ref", "\\u0024ref")),
    "rules": lark(rules(8500, "r")),
    "rules with dashes": lark(rules(7000, "r-")),
    "terminals": lark(rules(8500, "R")),
    "rules in brackets": lark(rules(600, "r", OPTIONAL)),
    "terminals in brackets": lark(rules(1500, "R", OPTIONAL)),
}
"""Most about as long as grammars may be. Read by recursion, each would need more stack than a thread has."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a long schema": (schema(chain(6000)), "json_schema: has 1"),
    "long rules": (lark(rules(12_000, "r")), "characters; the limit is 131,072"),
    "half a character": (schema({"const": "\ud800"}), "json_schema.schema: text must not contain lone surrogates"),
    "a number of 400 digits": (schema({"type": "integer", "maximum": 10**400}), "json_schema: "),
    "a schema of itself": (
        schema({"$ref": "#"}),
        "json_schema: no output can satisfy this grammar: nothing may come next",
    ),
    "a regex that nothing matches": (
        {"response_format": {"type": "regex", "regex": r"[^\s\S]"}},
        "regex: no output can satisfy this grammar: ",
    ),
    "a rule of itself": (lark('start: start "a"'), "lark: no output can satisfy this grammar: "),
    "every token forbidden": ({"logit_bias": {str(n): -100 for n in range(400)}}, "forbids every token"),
    "a field of half a character": ({"\ud800": 1}, "\\ud800 is not served here"),
    "a field of a megabyte": ({"x" * 900_000: 1}, "xxx"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_server_refuses_the_schema_and_keeps_serving(address: str, name: str) -> None:
    body, said = REFUSED[name]
    answer = ask(address, body)
    assert answer.status_code == 400, answer.text[:300]
    message = answer.json()["error"]["message"]
    assert said in message
    assert len(message) < 2100
    assert ask(address, {}).status_code == 200
    assert httpx.get(f"{address}/health").json()["in_flight"] == 0


TAGS = {"type": "array", "items": {"type": "string"}, "uniqueItems": False}
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "a keyword": (TAGS, "`uniqueItems` cannot be enforced; remove it"),
    "keywords": (
        {"type": "object", "if": {"required": ["b"]}, "then": {"required": ["c"]}},
        "`if` and `then` cannot be enforced; remove them",
    ),
    "alternatives": (
        {"oneOf": [{"type": "number"}, {"type": "integer"}]},
        "`oneOf` whose schemas may overlap cannot be enforced; use `anyOf`",
    ),
    "a format": ({"type": "string", "format": "zone"}, "`format` 'zone' cannot be enforced; remove it"),
    "a pattern": ({"type": "string", "pattern": "^(?=a).*"}, "regex parse error: ^(?=a).* error: look-around, "),
    "a type": ({"type": "thing"}, "Invalid type: thing"),
    "a large multiple": (
        {"type": "integer", "multipleOf": 9_999_991},
        "`multipleOf` 9999991 takes too long to enforce; remove it",
    ),
    "too much to compute": (
        {"type": "integer", "multipleOf": 19_997, "minimum": 1},
        "no output can satisfy this grammar: fuel exhausted",
    ),
}
"""Parameters that are refused, the last only when they are compiled for a vocabulary, and what is said of them."""


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_error_names_the_tool_with_unenforceable_parameters(address: str, name: str, choice: str) -> None:
    refused, said = NAMED[name]
    fine, wrong = ({"type": "object", "properties": {"a": value}} for value in ({"type": "integer"}, refused))
    wrong["required"] = ["a"]
    named = {"now": fine, "set_timer": wrong, "weather": fine}
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": tool, "parameters": named[tool], "strict": True}} for tool in named
    ]
    answer = ask(address, {"tools": tools, "tool_choice": choice})
    assert answer.status_code == 400, answer.text[:300]
    assert answer.json()["error"]["message"].startswith(f"tool 'set_timer': parameters: {said}")
    assert ask(address, {"tools": [tools[0], tools[2]], "tool_choice": choice}).status_code == 200
    tools[1]["function"]["strict"] = False
    is_ignored = name in ("a keyword", "keywords", "alternatives", "a format")
    assert ask(address, {"tools": tools, "tool_choice": choice}).status_code == (200 if is_ignored else 400)


def test_a_schema_beside_tools_is_named_itself(address: str) -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    format = schema({"type": "object", "not": {"required": ["a"]}})
    assert ask(address, {"tools": tools, **format}).status_code == 200
    format["response_format"]["json_schema"]["strict"] = True
    answer = ask(address, {"tools": tools, **format})
    assert answer.status_code == 400, answer.text[:300]
    assert answer.json()["error"]["message"] == "json_schema: `not` cannot be enforced; remove it"


@pytest.mark.parametrize("name", DEEP)
def test_a_deep_grammar_is_answered_or_refused(address: str, name: str) -> None:
    answer = ask(address, DEEP[name])
    assert answer.status_code == 200 or re.search(SMALL, answer.json()["error"]["message"]), answer.text[:300]
    assert ask(address, {}).status_code == 200


def test_server_refuses_a_hundred_thousand_brackets(address: str) -> None:
    function = {"name": "f", "arguments": '{"a":' + "[" * 90_000}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    messages = [{"role": "user", "content": "Hi"}, call, {"role": "tool", "tool_call_id": "1", "content": "x"}]
    answer = ask(address, {"messages": messages})
    assert answer.status_code == 400
    assert "are nested too deeply" in answer.json()["error"]["message"]


def test_server_refuses_a_schema_without_its_type(address: str) -> None:
    format = {"type": "json_object", "schema": {"const": {"a": 1}}}
    answer = ask(address, {"input": "Hi", "text": {"format": format}}, "responses")
    assert answer.status_code == 400
    assert "schema: needs type json_schema" in answer.json()["error"]["message"]
