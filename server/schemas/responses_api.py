"""Request model of POST /v1/responses, OpenAI's newer form of a chat. It is converted to a ChatRequest.

Nothing is stored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, ValidationError, model_validator

from .api_error import message_of
from .completions import MAX_MESSAGES, ChatRequest, ReasoningEffort, RequestBody, TopP, TranslatedRequest, in_range
from .messages import MAX_PARTS, MAX_TOOLS, Bool, ChatMessage, Float, Function, Int, JsonSchema, Name, RequestPart, Text


class ItemPart(RequestPart):
    without_effect = ("annotations", "logprobs")  # clients send them back with an answer
    type: Literal["input_text", "output_text"]
    text: Text


Content = Text | Annotated[list[ItemPart], Field(max_length=MAX_PARTS, fail_fast=True)]
"""The content of a message or of a result: a text, or texts that belong together."""


def _text_of(content: str | list[ItemPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class MessageItem(RequestPart):
    without_effect = ("id", "status")
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def as_message(self) -> dict[str, Any]:
        """Return the same as a chat message."""
        return {"role": self.role, "content": _text_of(self.content)}


class CallItem(RequestPart):
    without_effect = ("id", "status")
    type: Literal["function_call"]
    call_id: Text
    name: Name
    arguments: Text

    def as_message(self) -> dict[str, Any]:
        """Return the same as a chat message."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"id": self.call_id, "function": function}]}


class ResultItem(RequestPart):
    without_effect = ("id", "status")
    type: Literal["function_call_output"]
    call_id: Text
    output: Content

    def as_message(self) -> dict[str, Any]:
        """Return the same as a chat message."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": _text_of(self.output)}


class FlatTool(Function):
    type: Literal["function"]


class NamedFlatTool(RequestPart):
    type: Literal["function"]
    name: Name


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"] = "text"

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if self.type != "json_schema" and "schema_" in self.model_fields_set:
            raise ValueError("schema: needs type json_schema")
        if self.type == "json_schema" and "schema_" not in self.model_fields_set:
            raise ValueError("schema: is missing")
        return self


class Reasoning(RequestPart):
    without_effect = ("summary", "generate_summary")
    effort: ReasoningEffort | None = None


class TextOptions(RequestPart):
    without_effect = ("verbosity",)  # only some of OpenAI's models follow it
    format: TextFormat = TextFormat()


def _type_of(item: Any) -> str:
    """Return the type of an input item. Messages may omit it."""
    return (item.get("type") if isinstance(item, dict) else getattr(item, "type", None)) or "message"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")],
    Discriminator(
        _type_of,
        custom_error_type="item_type",
        custom_error_message="the type of an item must be message, function_call or function_call_output",
    ),
]


class ResponsesRequest(RequestBody, TranslatedRequest):
    """POST /v1/responses."""

    model: Text = ""
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: Text | None = None
    max_output_tokens: Annotated[Int | None, Field(ge=1, le=1_000_000)] = None
    temperature: Annotated[Float | None, in_range("temperature")] = None
    top_p: TopP | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field([])
    tool_choice: Literal["none", "auto", "required"] | NamedFlatTool = "auto"
    parallel_tool_calls: Bool = True
    reasoning: Reasoning = Reasoning()
    """Its effort sets variables of the chat template. The answer has no items for reasoning."""
    text: TextOptions = TextOptions()
    truncation: Literal["disabled", "auto"] = "disabled"
    include: list[JsonValue] = Field([], max_length=0)
    stream: Bool = False

    @staticmethod
    def refusal(error: ValidationError) -> str:
        first = error.errors()[0]
        is_input = error.title == ChatMessage.__name__ or first["loc"][:1] == ("messages",)
        place = "input: " if is_input else ""
        place += "calls of one turn: " if first["loc"][-1:] == ("tool_calls",) else ""
        return place + message_of(first)

    def translate(self) -> ChatRequest:
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        choice: Any = self.tool_choice
        if isinstance(choice, NamedFlatTool):
            choice = {"type": "function", "function": {"name": choice.name}}
        format = self.text.format
        schema = format.model_dump(by_alias=True, exclude={"type"})
        response_format = {"type": format.type, "json_schema": schema if format.type == "json_schema" else None}
        return ChatRequest(
            model=self.model,
            messages=[ChatMessage(**message) for message in [*instructions, *_messages_of(items)]],
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            tools=[{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools],  # type: ignore[list-item]
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=self.reasoning.effort,
            response_format=response_format,  # type: ignore[arg-type]
            stream=self.stream,
        ).allow_dropping(self.truncation == "auto")


def _messages_of(items: list[Any]) -> list[dict[str, Any]]:
    """Return the items as chat messages. Calls of one turn are several items, but one message."""
    messages: list[dict[str, Any]] = []
    for message in (item.as_message() for item in items):
        if message.get("tool_calls") and messages and messages[-1]["role"] == "assistant":
            calls = messages[-1].get("tool_calls", [])
            messages[-1] = {**messages[-1], "tool_calls": [*calls, *message["tool_calls"]]}
        else:
            messages.append(message)
    return messages
