"""Messages, functions and forms of answers, as OpenAI's clients send them."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, JsonValue, Strict, model_validator

from ...runtime.grammar import Grammar

MAX_CHARACTERS = 200_000
MAX_TOOLS = 128


def _encodable(text: str) -> str:
    """Text that a tokenizer can take: no NUL, no half of a surrogate pair."""
    if "\0" in text:
        raise ValueError("text must not contain NUL")
    return _whole_characters(text)


def _whole_characters(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("text must not contain lone surrogates") from error
    return text


def _json(value: Any) -> Any:
    """What any reader of JSON reads again: no NaN, no infinity, no half of a surrogate pair."""
    try:
        _whole_characters(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except ValueError as error:
        raise ValueError(str(error).replace("Out of range float values are", "NaN and Infinity are")) from error
    return value


def _number(value: Any) -> Any:
    """A number, which pydantic would read out of true and "3", too."""
    if isinstance(value, bool | str):
        raise ValueError("must be a number")
    return value


def _whole(value: Any) -> Any:
    """What JSON may write as 3.0, too; of 64 bits, as engines take it."""
    if isinstance(_number(value), float):
        if not value.is_integer():
            raise ValueError("must be a whole number")
        value = int(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("must be a whole number of 64 bits")
    return value


Int = Annotated[int, BeforeValidator(_whole)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Bool = Annotated[bool, Strict()]
Text = Annotated[str, Field(max_length=MAX_CHARACTERS), AfterValidator(_encodable)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
Json = Annotated[dict[str, JsonValue], AfterValidator(_json)]
"""An object."""


EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that ask for nothing, whatever their field is."""


class Sent(BaseModel):
    """What clients send; a field that is null has its default, one that is not served is refused unless it is empty."""

    without_effect: ClassVar[tuple[str, ...]] = ()
    """Fields that clients send, and that change nothing about an answer."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        if type(values) is not dict:
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()} | {*cls.without_effect}
        for name, value in values.items():
            if name not in known and not cls.asks_for_nothing(name, value):
                shown = json.dumps(str(name), ensure_ascii=False)[1:-1].encode("utf-8", "backslashreplace").decode()
                raise ValueError(f"{shown} is not served here; {cls.instead_of(name)}")
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def asks_for_nothing(cls, name: str, value: Any) -> bool:
        """Whether an unknown field has a value that changes nothing."""
        return value in EMPTY

    @classmethod
    def instead_of(cls, name: str) -> str:
        """What to do about an unknown field."""
        return "leave it out"


class TextPart(Sent):
    without_effect = ("cache_control",)  # Anthropic's, which gateways pass on
    type: Literal["text"]
    text: Text


class CalledFunction(Sent):
    name: Name
    arguments: Text
    """A JSON object."""

    def parsed(self) -> dict[str, Any]:
        """Name and arguments as chat templates know them."""
        try:
            arguments = _json(json.loads(self.arguments or "{}"))
        except json.JSONDecodeError:
            raise self._refused("must be a JSON object") from None
        except ValueError as error:  # a number of thousands of digits, NaN, half a character
            raise self._refused(str(error)) from error
        except RecursionError as error:
            raise self._refused("are nested too deeply") from error
        if not isinstance(arguments, dict):
            raise self._refused("must be a JSON object")
        return {"name": self.name, "arguments": arguments}

    def _refused(self, reason: str) -> ValueError:
        return ValueError(f"arguments of the call of {self.name!r}: {reason}")


class ToolCall(Sent):
    without_effect = ("index",)  # of a call that was put together from a stream
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Sent):
    without_effect = ("annotations", "reasoning", "reasoning_content", "provider_specific_fields", "cache_control")
    """What clients keep of an answer and send again with it."""
    role: Literal["system", "developer", "user", "assistant", "tool"]
    """OpenAI's newer models call their system messages the developer's."""
    content: Text | list[TextPart] = ""
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] = []
    tool_call_id: Text = ""
    name: Text = ""

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content: is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: are the assistant's")
        for call in self.tool_calls:
            call.function.parsed()
        return self

    def flat(self) -> dict[str, Any]:
        """As chat templates know it: {"role", "content"}, the content as one string, and the calls."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function.parsed()} for call in self.tool_calls
            ]
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        return {**message, "name": self.name} if self.name else message


class Function(Sent):
    name: Name
    description: Text = ""
    parameters: Json = {}
    """JSON schema of an object."""
    strict: Bool = True
    """Arguments always keep to the parameters."""

    @model_validator(mode="after")
    def _check_parameters(self) -> Function:
        if self.parameters.get("type", "object") != "object":
            raise ValueError("parameters: must describe an object")
        return self


class Tool(Sent):
    type: Literal["function"]
    function: Function

    def shown(self) -> dict[str, Any]:
        """As chat templates show it."""
        function = self.function
        shown = {"name": function.name, "description": function.description, "parameters": function.parameters}
        return {"type": "function", "function": {name: value for name, value in shown.items() if value}}


class NamedFunction(Sent):
    name: Name


class NamedTool(Sent):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class JsonSchema(Sent):
    name: Text = ""
    description: Text = ""
    strict: Bool = True
    """The answer always keeps to the schema."""
    schema_: Annotated[Json, Field(alias="schema")] = {}


class ResponseFormat(Sent):
    """Text, any JSON object, or OpenAI's json_schema; beyond it a regular expression or a Lark grammar."""

    type: Literal["text", "json_object", "json_schema", "regex", "lark"] = "text"
    json_schema: JsonSchema | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    """Of a json_object, as llama-server takes it."""
    regex: Text | None = None
    lark: Text | None = None

    @model_validator(mode="after")
    def _check_content(self) -> ResponseFormat:
        for name in ("json_schema", "regex", "lark"):
            if self.type == name and getattr(self, name) is None:
                raise ValueError(f"{name}: is missing")
            if self.type != name and getattr(self, name) is not None:
                raise ValueError(f"{name}: goes with type {name}")
        if self.json_schema is not None and "schema_" not in self.json_schema.model_fields_set:
            raise ValueError("json_schema.schema: is missing")
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError("schema: goes with type json_object")
        return self

    def schema_of_answer(self) -> dict[str, Any] | None:
        """JSON schema of the answer; None where it is no JSON."""
        if self.type == "json_object":
            return self.schema_ or {"type": "object"}
        return dict(self.json_schema.schema_) if self.type == "json_schema" and self.json_schema else None

    def grammar(self) -> Grammar | None:
        """What the answer must be; UsageError where that is malformed."""
        schema = self.schema_of_answer()
        if schema is not None:
            return Grammar.json_schema(schema)
        if self.regex is not None:
            return Grammar.regex(self.regex)
        return Grammar.lark(self.lark) if self.lark is not None else None
