"""Anthropic's API: POST /v1/messages and its count of tokens, with streams, functions and reasoning."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from ..runtime.call_reader import ArgumentsEvent, CallEvent, Event, ReasoningEvent
from .answers.builders import ChatBuilder, with_first
from .answers.choices import Choice
from .body import BodyRoute
from .endpoints import Endpoints
from .models.worker import Piece
from .schemas.api_error import APIError
from .schemas.completions import MAX_MESSAGES, MAX_STOPS, ChatRequest, TranslatedRequest
from .schemas.messages import MAX_PARTS, MAX_TOOLS, Bool, Float, Int, Json, Name, RequestPart, Text
from .schemas.response_models import ResponseModel

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
"""Reason for the end of an answer in OpenAI's API -> in Anthropic's, unless a stop text was found."""


class Block(RequestPart):
    without_effect = ("cache_control", "citations", "signature", "is_error")


class TextBlock(Block):
    type: Literal["text"]
    text: Text


class ThinkingBlock(Block):
    type: Literal["thinking"]
    thinking: Text


class CallBlock(Block):
    type: Literal["tool_use"]
    id: Text
    name: Name
    input: Json = Field(default={})


class ResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: Text
    content: Text | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)] = ""


AnyBlock = Annotated[TextBlock | ThinkingBlock | CallBlock | ResultBlock, Field(discriminator="type")]


class Turn(RequestPart):
    role: Literal["user", "assistant"]
    content: Text | Annotated[list[AnyBlock], Field(max_length=MAX_PARTS, fail_fast=True)]

    def as_messages(self) -> list[dict[str, Any]]:
        """Return the same as messages of OpenAI's API, results of calls first."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        results, calls, thoughts = [], [], []
        for block in self.content:
            if isinstance(block, ResultBlock):
                text = _text_of(block.content)
                results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
            elif isinstance(block, CallBlock):
                function = {"name": block.name, "arguments": json.dumps(block.input)}
                calls.append({"id": block.id, "function": function})
            elif isinstance(block, ThinkingBlock):
                thoughts.append(block.thinking)
        message: dict[str, Any] = {"role": self.role, "content": _text_of(self.content)}
        if thoughts:
            message["reasoning_content"] = "".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        # an empty message after results would be an empty question
        has_only_results = results and not message["content"] and not calls
        return results if has_only_results else [*results, message]


def _text_of(content: str | Sequence[Block]) -> str:
    if isinstance(content, str):
        return content
    return "".join(block.text for block in content if isinstance(block, TextBlock))


class AnthropicTool(RequestPart):
    without_effect = ("cache_control",)
    type: Literal["custom"] = "custom"
    name: Name
    description: Text = ""
    input_schema: Json
    strict: Bool = False

    def as_tool(self) -> dict[str, Any]:
        """Return the same as a tool of OpenAI's API."""
        function = self.model_dump(include={"name", "description", "strict"})
        return {"type": "function", "function": {**function, "parameters": self.input_schema}}


class ToolChoice(RequestPart):
    type: Literal["auto", "any", "tool", "none"] = "auto"
    name: Text = ""
    disable_parallel_tool_use: Bool = False


class Thinking(RequestPart):
    without_effect = ("budget_tokens", "display")
    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(RequestPart):
    type: Literal["json_schema"]
    schema_: Annotated[Json, Field(alias="schema")]


class OutputConfig(RequestPart):
    without_effect = ("effort",)
    format: OutputFormat | None = None


class MessagesRequest(TranslatedRequest):
    """POST /v1/messages."""

    without_effect = ("metadata", "service_tier")
    model: Text = ""
    max_tokens: Int | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Text | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)] = ""
    stream: Bool = False
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Int | None = None
    stop_sequences: Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)] = Field(default=[])
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(default=[])
    tool_choice: ToolChoice = ToolChoice()
    output_config: OutputConfig = OutputConfig()
    thinking: Thinking | None = None
    """Sets enable_thinking of the chat template."""

    def translate(self) -> ChatRequest:
        system = [{"role": "system", "content": text}] if (text := _text_of(self.system)) else []
        choice = self.tool_choice
        named = {"type": "function", "function": {"name": choice.name}}
        values: dict[str, Any] = {
            **self.model_dump(include={"model", "max_tokens", "stream", "temperature", "top_p", "top_k"}),
            "messages": list(itertools.chain(system, *(turn.as_messages() for turn in self.messages))),
            "stop": self.stop_sequences,
            "tools": [tool.as_tool() for tool in self.tools],
            "tool_choice": {"any": "required", "tool": named}.get(choice.type, choice.type),
            "parallel_tool_calls": not choice.disable_parallel_tool_use,
        }
        if self.output_config.format is not None:
            schema = {"schema": self.output_config.format.schema_, "strict": True}
            values["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.thinking is not None:
            values["chat_template_kwargs"] = {"enable_thinking": self.thinking.type != "disabled"}
        return ChatRequest.model_validate(values)


class AnthropicUsage(ResponseModel):
    input_tokens: int
    """Tokens that were evaluated. The cached ones are not among them."""
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(ResponseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: AnthropicUsage


class MessageBuilder(ChatBuilder):
    """Builds an answer of blocks: reasoning, texts and calls, whole or as typed events."""

    id_prefix = "msg_"
    ping = 'event: ping\ndata: {"type": "ping"}\n\n'

    def __init__(self, request: ChatRequest, choices: Sequence[Choice], began: float) -> None:
        super().__init__(request, choices, began)
        self._blocks: list[dict[str, Any]] = []
        self._arguments = ""
        """Arguments of the call in the last block."""
        self._is_open = False
        self._reason: str | None = None

    async def whole(self, pieces: AsyncGenerator[Piece]) -> AnthropicMessage:
        """Return the answer in one object, after the last piece."""
        async for piece in pieces:
            for _ in self._piece_events(piece):
                pass
        return self._message()

    async def events(self, first: Piece | None, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[str]:
        """Yield server-sent events of `first` and of the rest of `pieces`."""
        yield _written("message_start", message=self._message().model_dump())
        try:
            async for piece in with_first(first, pieces):
                if piece.is_ping:
                    yield self.ping
                for event in self._piece_events(piece):
                    yield event
        except APIError as error:
            yield _written("error", error=AnthropicEndpoints.error_body(error)["error"])
            return
        message = self._message()
        delta = message.model_dump(include={"stop_reason", "stop_sequence"})
        yield _written("message_delta", delta=delta, usage=message.usage.model_dump())
        yield _written("message_stop")

    def _piece_events(self, piece: Piece) -> Iterator[str]:
        """Add a piece to the blocks and yield its events."""
        for event in self.read(piece):
            yield from self._events_of(event)
        if piece.finish_reason:
            self._reason = self.finish_reason(piece)
            yield from self._close()

    def _events_of(self, event: Event) -> Iterator[str]:
        if isinstance(event, CallEvent):
            self._arguments = ""
            block = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": event.name, "input": {}}
            yield from self._open(block)
        elif isinstance(event, ArgumentsEvent):
            self._arguments += event.text
            yield self._delta_event("input_json_delta", partial_json=event.text)
        else:
            kind = "thinking" if isinstance(event, ReasoningEvent) else "text"
            if not self._blocks or self._blocks[-1]["type"] != kind:
                if not event.text.strip():  # white space between calls
                    return
                block = {"type": kind, kind: ""}
                if kind == "thinking":
                    block["signature"] = ""
                yield from self._open(block)
            self._blocks[-1][kind] += event.text
            yield self._delta_event(f"{kind}_delta", **{kind: event.text})

    def _delta_event(self, kind: str, **fields: str) -> str:
        return _written("content_block_delta", index=len(self._blocks) - 1, delta={"type": kind, **fields})

    def _open(self, block: dict[str, Any]) -> Iterator[str]:
        yield from self._close()
        self._blocks.append(block)
        self._is_open = True
        yield _written("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _close(self) -> Iterator[str]:
        """End the block in progress, if there is one. Arguments that the limit of tokens cut stay empty."""
        if not self._is_open:
            return
        self._is_open = False
        if self._blocks[-1]["type"] == "tool_use":
            try:
                self._blocks[-1]["input"] = json.loads(self._arguments)
            except ValueError:
                self._blocks[-1]["input"] = {}
        yield _written("content_block_stop", index=len(self._blocks) - 1)

    def _message(self) -> AnthropicMessage:
        usage = self.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        counts = AnthropicUsage(
            input_tokens=usage.prompt_tokens - cached,
            cache_read_input_tokens=cached,
            output_tokens=usage.completion_tokens,
        )
        reason, text = STOP_REASONS[self._reason] if self._reason else None, self.choices[0].generation.text
        if reason and text.stopped:
            reason = "stop_sequence"
        return AnthropicMessage(
            id=self.base["id"],
            model=self.base["model"],
            content=self._blocks,
            stop_reason=reason,
            stop_sequence=text.found if reason == "stop_sequence" else None,
            usage=counts,
        )


def _written(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


class AnthropicEndpoints:
    """The routes of Anthropic's API, which answer like those of OpenAI's."""

    prefix = "/v1/messages"

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints
        self.router = router = APIRouter(prefix=self.prefix, include_in_schema=False, route_class=BodyRoute)
        router.post("")(self.messages)
        router.post("/count_tokens")(self.count_tokens)

    @staticmethod
    def error_body(error: APIError) -> dict[str, Any]:
        """Return the body of an error in the shape of this API."""
        kinds = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
        kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}}

    async def messages(self, request: MessagesRequest, http: Request) -> Response:
        chat = request.translation
        return await self._endpoints.answer(chat, partial(MessageBuilder, chat), http)

    async def count_tokens(self, request: MessagesRequest, http: Request) -> Response:
        return await self._endpoints.count(request.translation, http)
