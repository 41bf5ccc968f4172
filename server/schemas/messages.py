"""Parts of request models: messages, functions, and formats of answers, with the checks of their values."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, JsonValue, Strict, model_validator

from ...runtime.grammar import Grammar, answer_schema
from ...runtime.tool_format import FUNCTION_NAME

MAX_CHARACTERS = 200_000
MAX_TOOLS = 128
MAX_PARTS = 512
"""Most parts of the content of a message."""


def _check_text(text: str) -> str:
    """Return text that a tokenizer accepts. It has no NUL and no lone surrogate."""
    if "\0" in text:
        raise ValueError("text must not contain NUL")
    return _without_surrogates(text)


def _without_surrogates(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("text must not contain lone surrogates") from error
    return text


def _check_json(value: Any) -> Any:
    """Return a value that every JSON parser can read. It has no NaN, infinity or lone surrogate."""
    try:
        _without_surrogates(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except ValueError as error:
        raise ValueError(str(error).replace("Out of range float values are", "NaN and Infinity are")) from error
    return value


def _to_int(value: Any) -> Any:
    """Return a float such as 3.0 as an int, because many JSON writers do not distinguish them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# without Strict, pydantic would also accept true and "3" as numbers
Int = Annotated[int, Strict(), BeforeValidator(_to_int)]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Bool = Annotated[bool, Strict()]
Text = Annotated[str, Field(max_length=MAX_CHARACTERS), AfterValidator(_check_text)]
Name = Annotated[str, Field(pattern=rf"^{FUNCTION_NAME}$")]
Json = Annotated[dict[str, JsonValue], AfterValidator(_check_json)]
"""A JSON object."""

EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that request nothing, in any field."""


class RequestPart(BaseModel):
    """A JSON object of a request. Null means a field's default. An unknown field is refused unless it is neutral."""

    without_effect: ClassVar[tuple[str, ...]] = ()
    """Unknown fields that clients send and that do not change an answer."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        if type(values) is not dict:
            return values
        # refused, not ignored: a client would take an answer without its option for one with it
        known = {field.alias or name for name, field in cls.model_fields.items()} | {*cls.without_effect}
        for name, value in values.items():
            if name not in known and not cls.is_neutral(name, value):
                shown = json.dumps(str(name), ensure_ascii=False)[1:-1].encode("utf-8", "backslashreplace").decode()
                raise ValueError(f"{shown} is not served here; {cls.remedy(name)}")
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def is_neutral(cls, name: str, value: Any) -> bool:
        """Return whether `value` of an unknown field requests nothing."""
        return value in EMPTY

    @classmethod
    def remedy(cls, name: str) -> str:
        """Return the advice for an unknown field."""
        return "remove it"


class TextPart(RequestPart):
    without_effect = ("cache_control",)  # a field of Anthropic's API, which gateways pass on
    type: Literal["text"]
    text: Text


class CalledFunction(RequestPart):
    name: Name
    arguments: Text
    """A JSON object."""

    def parsed(self) -> dict[str, Any]:
        """Return name and parsed arguments, as chat templates need them."""
        reason = "must be a JSON object"
        try:
            arguments = _check_json(json.loads(self.arguments or "{}"))
            if isinstance(arguments, dict):
                return {"name": self.name, "arguments": arguments}
        except json.JSONDecodeError:
            pass
        except ValueError as error:  # a number of thousands of digits, NaN or a lone surrogate
            reason = str(error)
        except RecursionError:
            reason = "are nested too deeply"
        raise ValueError(f"arguments of the call of {self.name!r}: {reason}")


class ToolCall(RequestPart):
    without_effect = ("index",)  # clients keep it when they join a call from a stream
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(RequestPart):
    without_effect = (
        *("annotations", "reasoning", "provider_specific_fields", "cache_control"),
        *("id", "timestamp", "type", "model", "thinking"),
    )
    """Fields of an answer that clients send back with it."""
    role: Literal["system", "developer", "user", "assistant", "tool"]
    """For OpenAI's newer models, the role of system messages is developer."""
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] = ""
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] = []
    tool_call_id: Text = ""
    reasoning_content: Text = ""
    """Reasoning of an earlier answer, which chat templates show or leave out."""
    name: Text = ""

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content: is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: need the role assistant")
        for call in self.tool_calls:
            call.function.parsed()
        return self

    def as_template_value(self) -> dict[str, Any]:
        """Return the message as chat templates need it, with its content as one string and its calls parsed."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function.parsed()} for call in self.tool_calls
            ]
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        return {**message, "name": self.name} if self.name else message


class Function(RequestPart):
    name: Name
    description: Text = ""
    parameters: Json = {}
    """JSON schema of an object."""
    strict: Bool = False
    """True if parameters with keywords that cannot be enforced are refused. Otherwise such keywords are ignored."""

    @model_validator(mode="after")
    def _check_parameters(self) -> Function:
        if self.parameters.get("type", "object") != "object":
            raise ValueError("parameters: must describe an object")
        return self


class Tool(RequestPart):
    type: Literal["function"]
    function: Function


class NamedFunction(RequestPart):
    name: Name


class NamedTool(RequestPart):
    type: Literal["function"]
    function: NamedFunction


ToolChoiceOption = Literal["none", "auto", "required"] | NamedTool


class JsonSchema(RequestPart):
    name: Text = ""
    description: Text = ""
    strict: Bool = False
    """True if a schema with keywords that cannot be enforced is refused. Otherwise see `answer_schema`."""
    schema_: Annotated[Json, Field(alias="schema")] = {}


class ResponseFormat(RequestPart):
    """Text, any JSON object or OpenAI's json_schema. Not from OpenAI: a regular expression or a Lark grammar."""

    type: Literal["text", "json_object", "json_schema", "regex", "lark"] = "text"
    json_schema: JsonSchema | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    """Schema of a json_object, as llama-server accepts it."""
    regex: Text | None = None
    lark: Text | None = None

    @model_validator(mode="after")
    def _check_content(self) -> ResponseFormat:
        for name in ("json_schema", "regex", "lark"):
            if self.type == name and getattr(self, name) is None:
                raise ValueError(f"{name}: is missing")
            if self.type != name and getattr(self, name) is not None:
                raise ValueError(f"{name}: needs type {name}")
        if self.json_schema is not None and "schema_" not in self.json_schema.model_fields_set:
            raise ValueError("json_schema.schema: is missing")
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError("schema: needs type json_object")
        return self

    def answer_schema(self) -> dict[str, Any] | None:
        """Return the JSON schema of the answer, None if it is not JSON."""
        if self.type == "json_object":
            return answer_schema(self.schema_ or {"type": "object"})
        if self.type != "json_schema" or self.json_schema is None:
            return None
        return answer_schema(self.json_schema.schema_, self.json_schema.strict)

    def grammar(self) -> Grammar | None:
        """Return the grammar of the answer, None for any text. UsageError if it is malformed."""
        schema = self.answer_schema()
        if schema is not None:
            return Grammar.json_schema(schema)
        if self.regex is not None:
            return Grammar.regex(self.regex)
        return Grammar.lark(self.lark) if self.lark is not None else None
