"""POST /v1/responses through the openai client: text, events, objects, calls and their results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from python_clients import Weather
from serving import openai_client, served

from efficientllm.server.schemas import response_models

TOOL: Any = {"type": "function", "name": "weather", "parameters": Weather.model_json_schema(), "strict": True}


@pytest.fixture(scope="module")
def client(artefact: Path) -> Iterator[openai.OpenAI]:
    with served(artefact, context=1024) as address, openai_client(address) as client:
        yield client


def test_response_equals_the_answer_of_the_chat(client: openai.OpenAI) -> None:
    common: Any = {"model": "tiny", "temperature": 0}
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(**common, messages=messages, max_tokens=8)
    answer = client.responses.create(**common, instructions="Be brief.", input="Hello", max_output_tokens=8)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.usage is not None
    assert chat.usage is not None
    assert answer.usage.total_tokens == chat.usage.total_tokens
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
    response_models.ResponseAnswer.model_validate(json.loads(answer.model_dump_json(exclude_unset=True)))
    kinds, text = [], ""
    for event in client.responses.create(**common, input=messages, max_output_tokens=8, stream=True):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == answer.output_text
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    ends = [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert kinds[-4:] == ends


def test_an_object_is_parsed(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model="tiny", input="Rome?", text_format=Weather, max_output_tokens=200)
    assert isinstance(answer.output_parsed, Weather)
    assert answer.status == "completed"


def test_call_and_result_continue_the_response(client: openai.OpenAI) -> None:
    common: Any = {"model": "tiny", "tools": [TOOL], "max_output_tokens": 200}
    question: Any = {"role": "user", "content": "Rome?"}
    answer = client.responses.create(**common, input=[question], tool_choice="required")
    (call,) = answer.output
    assert call.type == "function_call"
    Weather.model_validate_json(call.arguments)
    with client.responses.stream(
        **common, input=[question], tool_choice={"type": "function", "name": "weather"}
    ) as events:
        arguments = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
        (streamed,) = events.get_final_response().output
    assert streamed.type == "function_call"
    assert Weather.model_validate_json(arguments) == Weather.model_validate_json(streamed.arguments)
    common["max_output_tokens"] = 4
    for output in ("sunny", [{"type": "input_text", "text": "sunny"}]):
        result = {"type": "function_call_output", "call_id": call.call_id, "output": output}
        history: Any = [question, call.model_dump(exclude={"status", "id"}), result]
        assert client.responses.create(**common, input=history, tool_choice="none").output_text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not served here"),
        ({"store": True}, "store is not served here"),
        ({"input": [{"type": "reasoning", "id": "r"}]}, "input"),
        ({"tool_choice": "required"}, "tool_choice: required needs tools"),
    ],
)
def test_unserved_fields_give_one_line(client: openai.OpenAI, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "tiny", "input": "Hi", **fields})
    assert caught.value.body["message"].startswith(message)  # type: ignore[index]
    assert "\n" not in caught.value.body["message"]  # type: ignore[index]
