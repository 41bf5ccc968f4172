# pyright: reportMissingImports=false
"""What each client library is used for, against a server: python_clients.py NAME ADDRESS, where it is installed.

The model behind it writes noise, so what is asked has to be bounded by itself: names of cities, yes and no.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel


class Weather(BaseModel, extra="forbid"):
    """How it is in a city."""

    city: Literal["Paris", "Rome"]
    is_warm: bool


QUESTION = "How is the weather in Rome?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": Weather.model_json_schema()}}
KEY = "secret"
MOST = 200


def check_call(name: str, arguments: str | dict[str, Any]) -> None:
    """A call is one of the only function, with arguments that are its."""
    assert name == "weather", name
    Weather.model_validate(json.loads(arguments) if isinstance(arguments, str) else arguments)


def openai(address: str) -> None:
    """Parse, tools with their result, streams of both."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
    common: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": MOST}
    assert client.chat.completions.parse(**common, response_format=Weather).choices[0].message.parsed
    with client.chat.completions.stream(**common, response_format=Weather) as events:
        assert {event.type for event in events} >= {"content.delta", "content.done"}
    required: Any = {**common, "tools": [TOOL], "tool_choice": "required"}
    message = client.chat.completions.create(**required).choices[0].message
    (call,) = message.tool_calls or []
    check_call(call.function.name, call.function.arguments)
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    common["messages"] = [*MESSAGES, message.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(**common, tools=[TOOL], tool_choice="none").choices[0].message.content
    with client.chat.completions.stream(**required) as events:
        (call,) = events.get_final_completion().choices[0].message.tool_calls or []
    check_call(call.function.name, call.function.arguments)


def langchain(address: str) -> None:
    """ChatOpenAI: invoke, stream, structured output both ways, tools with their result."""
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="tiny", base_url=f"{address}/v1", api_key=KEY, max_retries=0, max_tokens=MOST)
    assert model.bind(max_tokens=8).invoke(QUESTION).content
    assert "".join(str(chunk.content) for chunk in model.bind(max_tokens=8).stream(QUESTION))
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Weather, method=method).invoke(QUESTION), Weather), method
    answer = model.bind_tools([TOOL], tool_choice="required").invoke(QUESTION)
    (call,) = answer.tool_calls
    check_call(call["name"], call["args"])
    history = [HumanMessage(QUESTION), answer, ToolMessage("sunny", tool_call_id=call["id"])]
    assert model.bind(max_tokens=8).invoke(history).content


def litellm(address: str) -> None:
    """completion: plain and streamed by every provider that can reach the server, structured, tools."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network
    from litellm import completion

    common: Any = {"model": "openai/tiny", "api_base": f"{address}/v1", "api_key": KEY, "messages": MESSAGES}
    v1 = ("openai", "text-completion-openai", "hosted_vllm", "lm_studio", "llamafile")
    for provider in (*v1, "ollama", "ollama_chat"):
        base = f"{address}/v1" if provider in v1 else address
        asked: Any = {**common, "model": f"{provider}/tiny", "api_base": base, "max_tokens": 8, "temperature": 0}
        assert completion(**asked).choices[0].message.content, provider
        pieces = [chunk.choices[0].delta.content or "" for chunk in completion(**asked, stream=True)]
        assert "".join(pieces), provider
    answer = completion(**common, max_tokens=MOST, response_format=Weather)
    Weather.model_validate_json(answer.choices[0].message.content)
    answer = completion(**common, max_tokens=MOST, tools=[TOOL], tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls
    check_call(call.function.name, call.function.arguments)


def instructor(address: str) -> None:
    """Objects by tools and by schema."""
    import instructor
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        patched = instructor.from_openai(client, mode=mode)
        options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": MOST, "max_retries": 0}
        assert isinstance(patched.chat.completions.create(**options, response_model=Weather), Weather), mode


def pydantic_ai(address: str) -> None:
    """Agents: text, streamed text, an object by a call and by its schema."""
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=f"{address}/v1", api_key=KEY))
    settings: Any = {"max_tokens": MOST}
    assert Agent(model, model_settings={"max_tokens": 8}).run_sync(QUESTION).output
    for output in (Weather, NativeOutput(Weather)):
        agent: Any = Agent(model, output_type=output, model_settings=settings)
        assert isinstance(agent.run_sync(QUESTION).output, Weather), output
    with Agent(model, model_settings={"max_tokens": 8}).run_stream_sync(QUESTION) as stream:
        assert "".join(stream.stream_text(delta=True))


def llama_index(address: str) -> None:
    """OpenAILike: chat, stream, completion, an object."""
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    options: Any = {"model": "tiny", "api_base": f"{address}/v1", "api_key": KEY, "max_retries": 0}
    chat = OpenAILike(
        **options,
        max_tokens=MOST,
        is_chat_model=True,
        is_function_calling_model=True,
        should_use_structured_outputs=True,
    )
    question = [ChatMessage(role="user", content=QUESTION)]
    assert chat.chat(question, max_tokens=8).message.content
    assert "".join(piece.delta or "" for piece in chat.stream_chat(question, max_tokens=8))
    assert isinstance(chat.as_structured_llm(Weather).chat(question).raw, Weather)
    assert OpenAILike(**options, max_tokens=8, is_chat_model=False).complete(QUESTION).text


def llm(address: str) -> None:
    """`llm`'s models from its file: prompt, stream, schema."""
    with tempfile.TemporaryDirectory() as folder:
        entry = f'model_id: tiny\n  model_name: tiny\n  api_base: "{address}/v1"\n  api_key_name: tiny\n'
        entry += "  supports_schema: true\n"
        (Path(folder) / "extra-openai-models.yaml").write_text(f"- {entry}")
        os.environ["LLM_USER_PATH"] = folder
        import llm

        model = llm.get_model("tiny")
        model.key = KEY
        assert model.prompt(QUESTION, stream=False, max_tokens=8).text()
        assert "".join(model.prompt(QUESTION, max_tokens=8))
        answer = model.prompt(QUESTION, schema=Weather, stream=False, max_tokens=MOST).text()
        Weather.model_validate_json(answer)


CLIENTS = {
    "openai": openai,
    "langchain_openai": langchain,
    "litellm": litellm,
    "instructor": instructor,
    "pydantic_ai": pydantic_ai,
    "llama_index": llama_index,
    "llm": llm,
}
"""Name of the package -> what is tried with it."""

if __name__ == "__main__":
    CLIENTS[sys.argv[1]](sys.argv[2])
