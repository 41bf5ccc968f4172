"""Reasoning of a model: apart from the answer in every API, and turned on and off by the request."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import http_client, loaded_pool, serve

from efficientllm.runtime.call_reader import (
    ArgumentsEvent,
    CallEvent,
    CallReader,
    Event,
    ReasoningEvent,
    ReasoningReader,
    TextEvent,
)
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.runtime.grammar import Grammar, GrammarConstraint
from efficientllm.runtime.tool_format import GENERIC
from efficientllm.server.answers import choices
from efficientllm.server.models.pool import ModelPool
from efficientllm.server.options import AppOptions

MESSAGES = [{"role": "user", "content": "Hello"}]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% if opens %}<think>\n{% endif %}{% endif %}"
)
"""The end of Qwen3's template. With `opens` it ends like that of models that always reason."""


@pytest.fixture(scope="module")
def pool(artefact: Path) -> ModelPool:
    return loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=1024))


@pytest.fixture(scope="module")
def client(pool: ModelPool) -> Iterator[httpx.Client]:
    engine = pool.loaded["tiny"].engine
    plain, engine.chat_template = engine.chat_template, TEMPLATE
    with serve(pool, AppOptions()) as address, http_client(address) as client:
        yield client
    engine.chat_template = plain


def answer_with(monkeypatch: pytest.MonkeyPatch, pool: ModelPool, text: str) -> None:
    """Let the model write `text`, which is free text for the server."""
    engine = pool.loaded["tiny"].engine
    monkeypatch.setattr(choices, "_copy_of", lambda _: GrammarConstraint(engine, Grammar.regex(re.escape(text))))


def chat(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 60, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("opens", [False, True])
def test_reasoning_is_apart_from_the_answer(
    client: httpx.Client, pool: ModelPool, monkeypatch: pytest.MonkeyPatch, opens: bool
) -> None:
    answer_with(monkeypatch, pool, ("" if opens else "<think>") + "\nA < b.\n</think>\n\nIt is so.")
    body = {"chat_template_kwargs": {"opens": opens}}
    message = chat(client, **body)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("A < b.", "It is so.")
    reasoning = content = ""
    sent = {"messages": MESSAGES, "max_tokens": 60, "stream": True, **body}
    with client.stream("POST", "/v1/chat/completions", json=sent) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                assert not (delta.get("reasoning_content") and content)
                reasoning += delta.get("reasoning_content", "")
                content += delta.get("content", "")
    assert (reasoning, content) == ("A < b.", "It is so.")


def test_ollama_and_responses_have_reasoning_apart(
    client: httpx.Client, pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, pool, "<think>\nHm.\n</think>\n\nYes.")
    for stream in (False, True):
        sent = {"model": "tiny", "messages": MESSAGES, "stream": stream, "think": True}
        lines = [json.loads(line) for line in client.post("/api/chat", json=sent).text.splitlines()]
        assert "".join(line["message"].get("thinking", "") for line in lines) == "Hm."
        assert "".join(line["message"]["content"] for line in lines) == "Yes."
    asked = {"model": "tiny", "prompt": "Hello", "stream": False, "think": "low"}
    generated = client.post("/api/generate", json=asked).json()
    assert (generated["thinking"], generated["response"]) == ("Hm.", "Yes.")
    answer = client.post("/v1/responses", json={"input": "Hello", "reasoning": {"effort": "low"}}).json()
    assert [item["content"][0]["text"] for item in answer["output"]] == ["Yes."]


def test_the_effort_reaches_the_template(client: httpx.Client) -> None:
    def prompt_tokens(**body: Any) -> int:
        return chat(client, max_tokens=1, **body)["usage"]["prompt_tokens"]

    plain, off = prompt_tokens(), prompt_tokens(chat_template_kwargs={"enable_thinking": False})
    assert off > plain
    assert prompt_tokens(reasoning_effort="none") == off
    assert prompt_tokens(reasoning_effort="high") == plain
    assert prompt_tokens(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True}) == plain
    earlier = [*MESSAGES, {"role": "assistant", "content": "Hi"}, *MESSAGES]
    thought = [MESSAGES[0], {**earlier[1], "reasoning_content": "Well."}, MESSAGES[0]]
    assert prompt_tokens(messages=thought) > prompt_tokens(messages=earlier)


def test_an_effort_without_reasoning_is_refused(artefact: Path) -> None:
    with serve(loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=256)), AppOptions()) as address:
        for effort, status in (("none", 200), ("high", 400)):
            sent = {"messages": MESSAGES, "reasoning_effort": effort, "max_tokens": 1}
            answer = httpx.post(f"{address}/v1/chat/completions", json=sent)
            assert answer.status_code == status
    message = "the chat template of this model knows no reasoning; remove reasoning_effort or think"
    assert answer.json()["error"]["message"] == message


def test_a_response_format_is_the_answer_though_the_prompt_opens_reasoning(client: httpx.Client) -> None:
    format = {"type": "regex", "regex": "yes|no"}
    message = chat(client, response_format=format, chat_template_kwargs={"opens": True})["choices"][0]["message"]
    assert message["content"] in ("yes", "no")
    assert "reasoning_content" not in message


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
READ = {
    "<think>\n a <b> \n</think>\n\n c </think> d": (" a <b> ".strip(), "c </think> d", 0),
    "\n<think></think>only text": ("", "only text", 0),
    "no <think>reasoning</think>": ("", "no <think>reasoning</think>", 0),
    "<thin": ("", "<thin", 0),
    "<think>cut </think": ("cut </think", "", 0),
    "": ("", "", 0),
    f"<think>{CALL}</think>\n{CALL}": (CALL, "", 1),
}


@pytest.mark.parametrize("text", READ)
def test_pieces_of_any_length_are_read_alike(text: str) -> None:
    chance = random.Random(0)
    for _ in range(50):
        reader, events, rest = ReasoningReader(False, CallReader(GENERIC)), list[Event](), text
        while rest:
            length = chance.randint(1, 9)
            events += reader.push(rest[:length])
            rest = rest[length:]
        events += reader.finish()
        kinds = (ReasoningEvent, TextEvent)
        found = ["".join(event.text for event in events if isinstance(event, kind)) for kind in kinds]
        assert (*found, reader.num_calls) == READ[text]
        assert all(not isinstance(event, CallEvent | ArgumentsEvent) or reader.num_calls for event in events)
