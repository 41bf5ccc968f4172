"""Calls, forms of answers and begun answers through the openai client, with a template that knows functions and one
that does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from serving import loaded_pool, openai_client, serve
from test_tools import QWEN
from tiny import tiny_architecture, tiny_model
from transformers import PreTrainedTokenizerFast

from efficientllm.export import cli as export_cli
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.options import AppOptions
from efficientllm.train.model.irregular import save_checkpoint

QUESTION: Any = [{"role": "user", "content": "How is Rome?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "is_now": {"type": "boolean"}},
    "required": ["city", "is_now"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def client(
    artefact: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("calls")
    before, tokenizer.chat_template = tokenizer.chat_template, QWEN
    model = tiny_model(tiny_architecture(), max_position_embeddings=1024)
    save_checkpoint(model, tokenizer, folder / "checkpoint")
    tokenizer.chat_template = before
    arguments = [str(folder / "checkpoint"), "--target", "gguf", "--quantize", "f32", "--output", str(folder / "gguf")]
    assert run_command(export_cli.body, [*arguments, "--no-verify"]) == 0
    pool = loaded_pool({"plain": str(artefact), "calls": str(folder / "gguf")}, EngineOptions(threads=1, context=1024))
    with serve(pool, AppOptions()) as address, openai_client(address) as client:
        yield client


both = pytest.mark.parametrize("model", ["plain", "calls"])


@both
@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_is_valid(client: openai.OpenAI, model: str, seed: int) -> None:
    settings: Any = {"model": model, "messages": QUESTION, "tools": TOOLS, "tool_choice": "required"}
    settings |= {"parallel_tool_calls": False, "max_tokens": 300, "seed": seed, "temperature": 1.5}
    choice = client.chat.completions.create(**settings).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or []
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert arguments.keys() == {"city", "is_now"}
        assert arguments["city"] in ("Paris", "Rome")
    else:
        assert (call.function.name, arguments) == ("now", {})
    name, streamed, reason = "", "", None
    for chunk in client.chat.completions.create(**settings, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert delta.function is not None
            name += delta.function.name or ""
            streamed += delta.function.arguments or ""
        assert not chunk.choices[0].delta.content
        reason = chunk.choices[0].finish_reason or reason
    assert (name, json.loads(streamed), reason) == (call.function.name, arguments, "tool_calls")
    for limit in range(1, 12):  # the marks of a call that the limit cuts are no text
        answer = client.chat.completions.create(**settings | {"max_tokens": limit})
        assert not answer.choices[0].message.content
        used: Any = answer.usage
        assert used.prompt_tokens_details.cached_tokens <= used.prompt_tokens  # forced tokens are no part of the prompt


def asked(*names: str) -> dict[str, Any]:
    """Return a request for one call of a function whose arguments are texts of these names, the city required."""
    parameters = {"type": "object", "properties": {each: {"type": "string"} for each in names}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    settings = {"tool_choice": "required", "temperature": 1.5, "max_tokens": 300, "parallel_tool_calls": False}
    return {"messages": QUESTION, "tools": tools, **settings}


@both
def test_arguments_are_copied_from_the_request(client: openai.OpenAI, model: str) -> None:
    for seed in range(3):
        settings: Any = asked("city") | {"model": model, "seed": seed, "extra_body": {"tool_arguments": "copy"}}
        answer = client.chat.completions.create(**settings)
        (call,) = answer.choices[0].message.tool_calls or []
        assert json.loads(call.function.arguments)["city"].casefold() in "how is rome?"
        usage = answer.model_dump()["usage"]
        assert 0 < usage["completion_tokens_details"]["passes"] < 0.7 * usage["completion_tokens"]


def test_a_flag_copies_arguments_of_all_requests(artefact: Path) -> None:
    pool = loaded_pool({"plain": str(artefact)}, EngineOptions(threads=1, context=1024))
    with serve(pool, AppOptions(tool_arguments="copy")) as address, httpx.Client(base_url=address) as client:

        def arguments(**more: Any) -> str:
            answer = client.post("/v1/chat/completions", json={**asked("city"), "seed": 1, **more}).json()
            return answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]

        assert json.loads(arguments())["city"].casefold() in "how is rome?"
        assert arguments(tool_arguments="any") != arguments() == arguments(tool_arguments="copy")


@both
def test_named_function_is_called_and_its_result_continues_the_chat(client: openai.OpenAI, model: str) -> None:
    settings: Any = {"model": model, "tools": TOOLS, "max_tokens": 200, "temperature": 0}
    message = client.chat.completions.create(**settings, messages=QUESTION, tool_choice=NAMED).choices[0].message
    (call,) = message.tool_calls or []
    assert call.function.name == "weather"
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    history = [*QUESTION, message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(**{**settings, "max_tokens": 4}, messages=history, tool_choice="none")
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.tool_calls is None


@both
def test_an_answer_that_may_call_may_as_well_not(client: openai.OpenAI, model: str) -> None:
    settings: Any = {"model": model, "messages": QUESTION, "tools": TOOLS, "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**settings).choices[0]
    assert answer.message.content
    streamed = client.chat.completions.create(**settings, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == answer.message.content


class Report(pydantic.BaseModel):
    city: str = pydantic.Field(pattern="^(Paris|Rome)$")
    is_warm: bool


def test_parse_gives_the_object(client: openai.OpenAI) -> None:
    settings: Any = {"model": "plain", "messages": QUESTION, "max_tokens": 200, "seed": 1}
    answer = client.chat.completions.parse(**settings, response_format=Report).choices[0]
    assert isinstance(answer.message.parsed, Report)
    with client.chat.completions.stream(**settings, response_format=Report) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == answer.message.parsed


def test_answer_continues_the_begun_message(client: openai.OpenAI) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "Rome is"}]
    settings: Any = {"model": "plain", "temperature": 0, "max_tokens": 8}
    answer = client.chat.completions.create(**settings, messages=begun).choices[0].message.content
    text = "<|im_start|>user\nHow is Rome?<|im_end|>\n<|im_start|>assistant\nRome is"
    address = str(client.base_url).removesuffix("/v1/")
    tokens = httpx.post(f"{address}/tokenize", json={"content": text}).json()["tokens"]
    assert answer == client.completions.create(**settings, prompt=tokens).choices[0].text
