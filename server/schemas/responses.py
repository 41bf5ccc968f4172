"""POST /v1/responses: OpenAI's newer form of a chat, taken as the chat that it is. Nothing is stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, ValidationError, model_validator

from .completions import LEAST_TOP_P, MAX_MESSAGES, Asked, ChatRequest
from .invalid import text_of
from .messages import MAX_TOOLS, Bool, ChatMessage, Float, Function, Int, JsonSchema, Name, Sent, Text


class ItemPart(Sent):
    without_effect = ("annotations", "logprobs")  # of an answer that is sent again
    type: Literal["input_text", "output_text"]
    text: Text


class MessageItem(Sent):
    without_effect = ("id", "status")
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ItemPart]

    def as_message(self) -> dict[str, Any]:
        """The chat's message."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class CallItem(Sent):
    without_effect = ("id", "status")
    type: Literal["function_call"]
    call_id: Text
    name: Name
    arguments: Text

    def as_message(self) -> dict[str, Any]:
        """The chat's message."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"id": self.call_id, "function": function}]}


class ResultItem(Sent):
    without_effect = ("id", "status")
    type: Literal["function_call_output"]
    call_id: Text
    output: Text

    def as_message(self) -> dict[str, Any]:
        """The chat's message."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": self.output}


class FlatTool(Function):
    type: Literal["function"]


class NamedFlatTool(Sent):
    type: Literal["function"]
    name: Name


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"] = "text"

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if self.type != "json_schema" and "schema_" in self.model_fields_set:
            raise ValueError("schema: goes with type json_schema")
        if self.type == "json_schema" and "schema_" not in self.model_fields_set:
            raise ValueError("schema: is missing")
        return self


class TextOptions(Sent):
    without_effect = ("verbosity",)  # a wish that only some of OpenAI's models know
    format: TextFormat = TextFormat()


def _kind(item: Any) -> str:
    """What an item of the input is; a message may leave it out."""
    return (item.get("type") if isinstance(item, dict) else getattr(item, "type", None)) or "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message="the type of an item must be message, function_call or function_call_output",
    ),
]


class ResponsesRequest(Asked):
    """POST /v1/responses"""

    model: Text
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Annotated[Int | None, Field(ge=1, le=1_000_000)] = None
    temperature: Annotated[Float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[Float | None, Field(ge=LEAST_TOP_P, le=1)] = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] = Field([])
    tool_choice: Literal["none", "auto", "required"] | NamedFlatTool = "auto"
    parallel_tool_calls: Bool = True
    text: TextOptions = TextOptions()
    truncation: Literal["disabled"] = "disabled"
    include: list[JsonValue] = Field([], max_length=0)
    stream: Bool = False

    @model_validator(mode="after")
    def _check_chat(self) -> ResponsesRequest:
        try:
            self.as_chat()
        except ValidationError as error:  # its own text has several lines
            first = error.errors()[0]
            is_input = error.title == ChatMessage.__name__ or first["loc"][:1] == ("messages",)
            place = "input: " if is_input else ""
            place += "calls of one turn: " if first["loc"][-1:] == ("tool_calls",) else ""
            raise ValueError(place + text_of(first)) from error
        return self

    def as_chat(self) -> ChatRequest:
        """The chat that it asks for; a ValueError where that is refused."""
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        choice: Any = self.tool_choice
        if isinstance(choice, NamedFlatTool):
            choice = {"type": "function", "function": {"name": choice.name}}
        format = self.text.format
        schema = (
            {"json_schema": format.model_dump(by_alias=True, exclude={"type"})} if format.type == "json_schema" else {}
        )
        return ChatRequest(
            model=self.model,
            messages=[ChatMessage(**message) for message in [*instructions, *_joined(items)]],
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            tools=[{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools],  # type: ignore[list-item]
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format={"type": format.type, **schema},  # type: ignore[arg-type]
            stream=self.stream,
        )


def _joined(items: list[Any]) -> list[dict[str, Any]]:
    """The items as messages; calls of one turn, which are items of their own here, are one message there."""
    messages: list[dict[str, Any]] = []
    for message in (item.as_message() for item in items):
        if message.get("tool_calls") and messages and messages[-1]["role"] == "assistant":
            calls = messages[-1].get("tool_calls", [])
            messages[-1] = {**messages[-1], "tool_calls": [*calls, *message["tool_calls"]]}
        else:
            messages.append(message)
    return messages
