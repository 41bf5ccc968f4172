"""Ollama's API: chat, generate, embed, tags, ps, show and version, with streams of JSON lines and calls."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field

from ..runtime.base.quantities import format_count
from ..runtime.engines.artefact import Artefact
from .answers.builders import ChatBuilder, CollectedChoice, with_first
from .answers.choices import Choice
from .body import BodyRoute
from .endpoints import Endpoints
from .models.pool import ModelPool
from .models.worker import Piece
from .schemas.api_error import APIError
from .schemas.completions import (
    MAX_INPUTS,
    MAX_MESSAGES,
    MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    LlamaSampling,
    TextRequest,
    TranslatedRequest,
)
from .schemas.messages import MAX_TOOLS, Bool, Float, Int, Json, Name, RequestPart, Text, Tool
from .schemas.response_models import UNLESS_NONE, ResponseModel

DEFAULT_TAG = ":latest"
"""Tag that Ollama's clients add to the name of a model."""

NANOSECONDS = 10**9

LONGEST_SECONDS = 10**9
"""Time that /api/ps shows for a model that is never unloaded."""

SECONDS_OF_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
"""Units of durations in Go, such as those of keep_alive."""


class Options(LlamaSampling):
    """Sampling options. Those of Ollama's engine, such as the size of the context, have no effect."""

    without_effect = (
        *("num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "numa"),
        *("low_vram", "vocab_only", "f16_kv", "repeat_last_n", "penalize_newline", *LlamaSampling.without_effect),
    )
    seed: Int | None = None
    num_predict: Int = -1

    def as_fields(self) -> dict[str, Any]:
        """Return the same as fields of a CompletionRequest."""
        fields = self.model_dump(exclude={"num_predict", "repeat_penalty"})
        limit = self.num_predict if self.num_predict > 0 else MAX_TOKENS
        return {**fields, "repetition_penalty": self.repeat_penalty, "max_tokens": limit}


class CalledFunction(RequestPart):
    without_effect = ("index",)
    name: Name
    arguments: Json = Field(default={})


class Call(RequestPart):
    without_effect = ("id", "type")
    function: CalledFunction


class Message(RequestPart):
    without_effect = ("tool_call_id",)
    role: Literal["system", "user", "assistant", "tool"]
    content: Text = ""
    thinking: Text = ""
    tool_calls: Annotated[list[Call], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(default=[])
    tool_name: Text = ""

    def as_message(self) -> dict[str, Any]:
        """Return the same as a message of OpenAI's API."""
        calls = []
        for index, call in enumerate(self.tool_calls):
            arguments = json.dumps(call.function.arguments)
            function = {"name": call.function.name, "arguments": arguments}
            calls.append({"id": f"call_{index}", "function": function})
        message: dict[str, Any] = {"role": self.role, "content": self.content, "reasoning_content": self.thinking}
        if self.tool_name:
            message["name"] = self.tool_name
        if calls:
            message["tool_calls"] = calls
        return message


def _seconds(value: Any) -> Any:
    """Return the seconds of a number or of a duration such as 1h30m."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(-?)((\d+(\.\d+)?(ms|s|m|h)?)+)", value)
    if found is None:
        return value  # which the type of the field refuses
    seconds = 0.0
    for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)?", found[2]):
        seconds += float(number) * SECONDS_OF_UNIT[unit or "s"]
    return -seconds if found[1] else seconds


KeepAlive = Annotated[Float, BeforeValidator(_seconds), Field(ge=-1e9, le=1e9)]
"""Seconds, or a duration such as 5m, in which a model stays loaded after the request. Negative: for ever."""


class OllamaRequest(TranslatedRequest):
    """The fields of both endpoints."""

    without_effect = ("shift",)
    model: Text
    truncate: Bool = True
    """Drop the oldest turns of a conversation that does not fit. If false, it is refused."""
    keep_alive: KeepAlive | None = None
    format: Literal["", "json"] | Json = ""
    """The text json, or a JSON schema."""
    options: Options = Options()
    stream: Bool = True
    think: Bool | Literal["low", "medium", "high"] | None = None
    """False sets enable_thinking of the chat template. Other values are a reasoning_effort, true that of medium."""

    @property
    def is_load(self) -> bool:
        """Return True for a request without content, which only loads the model."""
        raise NotImplementedError

    def completion(self, **fields: Any) -> dict[str, Any]:
        """Return the fields of a CompletionRequest."""
        format: dict[str, Any] = {"type": "json_object"} if self.format else {}
        if isinstance(self.format, dict) and self.format:
            format["schema"] = self.format
        common = {"model": self.model, "stream": self.stream, "response_format": format}
        return common | self.options.as_fields() | fields

    def chat(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> ChatRequest:
        """Return a chat with these options."""
        if self.think is False:
            fields["chat_template_kwargs"] = {"enable_thinking": False}
        elif self.think is not None:
            fields["reasoning_effort"] = "medium" if self.think is True else self.think
        values = self.completion(messages=messages, **fields)
        return ChatRequest.model_validate(values).allow_dropping(self.truncate)


class OllamaChat(OllamaRequest):
    """POST /api/chat."""

    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES, fail_fast=True)] = Field(default=[])
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(default=[])

    @property
    def is_load(self) -> bool:
        return not self.messages

    def translate(self) -> CompletionRequest:
        messages = [message.as_message() for message in self.messages] or [{"role": "user", "content": ""}]
        return self.chat(messages, tools=[tool.model_dump() for tool in self.tools])


class OllamaPrompt(OllamaRequest):
    """POST /api/generate."""

    prompt: Text = ""
    system: Text = ""
    raw: Bool = False
    """True if the prompt is continued as it is, without the chat template."""

    @property
    def is_load(self) -> bool:
        return not self.prompt

    def translate(self) -> CompletionRequest:
        if self.raw:
            if self.system or self.think:
                raise ValueError("raw: has no chat template for system and think; remove them")
            return TextRequest.model_validate(self.completion(prompt=self.prompt))
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.chat([*system, {"role": "user", "content": self.prompt}])


class OllamaEmbed(RequestPart):
    """POST /api/embed."""

    without_effect = ("options",)
    model: Text
    truncate: Bool = True
    """Whether the end of a text that does not fit is cut off. Otherwise it is refused."""
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    keep_alive: KeepAlive | None = None


class ModelName(RequestPart):
    """POST /api/show."""

    without_effect = ("verbose",)
    model: Text = ""
    name: Text = ""
    """The older name of the field `model`."""


class OllamaFunction(ResponseModel):
    name: str
    arguments: dict[str, Any]


class OllamaCall(ResponseModel):
    function: OllamaFunction


class OllamaMessage(ResponseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    thinking: Annotated[str | None, UNLESS_NONE] = None
    tool_calls: Annotated[list[OllamaCall] | None, UNLESS_NONE] = None


class OllamaAnswer(ResponseModel):
    """An answer or one line of its stream. Only the last line has a reason and counts."""

    model: str
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat().replace("+00:00", "Z"))
    message: Annotated[OllamaMessage | None, UNLESS_NONE] = None
    response: Annotated[str | None, UNLESS_NONE] = None
    thinking: Annotated[str | None, UNLESS_NONE] = None
    done: bool
    done_reason: Annotated[str | None, UNLESS_NONE] = None
    total_duration: Annotated[int | None, UNLESS_NONE] = None
    load_duration: Annotated[int | None, UNLESS_NONE] = None
    prompt_eval_count: Annotated[int | None, UNLESS_NONE] = None
    prompt_eval_duration: Annotated[int | None, UNLESS_NONE] = None
    eval_count: Annotated[int | None, UNLESS_NONE] = None
    eval_duration: Annotated[int | None, UNLESS_NONE] = None
    confidence: Annotated[float | None, UNLESS_NONE] = None
    """Probability that the calls are right."""


class OllamaEmbeddings(ResponseModel):
    model: str
    embeddings: list[list[float]]
    prompt_eval_count: int


class OllamaBuilder(ChatBuilder):
    """Builds the answer to a request of Ollama's API, whole or as JSON lines."""

    media_type = "application/x-ndjson"
    ping = ""  # clients parse every line, but the first ping sends the head

    def __init__(self, request: CompletionRequest, has_messages: bool, choices: Sequence[Choice], began: float) -> None:
        """Answer `request`, one of /api/chat if it `has_messages`."""
        super().__init__(request, choices, began)
        self._has_messages = has_messages
        self._collected = CollectedChoice("")

    async def whole(self, pieces: AsyncGenerator[Piece]) -> OllamaAnswer:
        """Return the answer in one object, after the last piece."""
        async for piece in pieces:
            self._add(piece)
        return self._end(self._collected.text, self._collected.reasoning)

    async def events(self, first: Piece | None, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[str]:
        """Yield the JSON lines of `first` and of the rest of `pieces`. Calls are in the last one."""
        try:
            async for piece in with_first(first, pieces):
                if piece.is_ping:
                    yield self.ping
                for line in self._lines(piece):
                    yield line
        except APIError as error:
            yield json.dumps(OllamaEndpoints.error_body(error)) + "\n"
            return
        yield self._end("").model_dump_json() + "\n"

    def _add(self, piece: Piece) -> tuple[str, str]:
        """Collect a piece and return its text and reasoning."""
        before = len(self._collected.text), len(self._collected.reasoning)
        for event in self.read(piece):
            self._collected.add(event)
        self._collected.finish_reason = piece.finish_reason or self._collected.finish_reason
        return self._collected.text[before[0] :], self._collected.reasoning[before[1] :]

    def _lines(self, piece: Piece) -> Iterator[str]:
        text, reasoning = self._add(piece)
        if text or reasoning:
            yield self._answer(text, reasoning, done=False).model_dump_json() + "\n"

    def _answer(self, text: str, reasoning: str, calls: list[OllamaCall] | None = None, **fields: Any) -> OllamaAnswer:
        said: dict[str, Any] = {"response": text, "thinking": reasoning or None}
        if self._has_messages:
            said = {"message": OllamaMessage(content=text, thinking=reasoning or None, tool_calls=calls)}
        return OllamaAnswer(model=self.base["model"], **said, **fields)

    def _end(self, text: str, reasoning: str = "") -> OllamaAnswer:
        """Return the last line, or the whole answer."""
        stats = self.choices[0].generation.stats
        parsed = []
        for call in self._collected.calls:  # Ollama's arguments are an object, not text
            with contextlib.suppress(ValueError):  # the limit may have cut the last call
                arguments = json.loads(call.function.arguments)
                parsed.append(OllamaCall(function=OllamaFunction(name=call.function.name, arguments=arguments)))
        first_seconds = stats.time_to_first_token_ms / 1e3
        return self._answer(
            text,
            reasoning,
            parsed or None,
            done=True,
            done_reason=self._collected.finish_reason,
            total_duration=int(NANOSECONDS * (time.perf_counter() - self.began)),
            load_duration=0,
            prompt_eval_count=stats.prompt_tokens,
            prompt_eval_duration=int(NANOSECONDS * first_seconds),
            eval_count=stats.completion_tokens,
            eval_duration=int(NANOSECONDS * stats.decode_seconds),
            confidence=self.confidence(),
        )


class OllamaEndpoints:
    """The routes of Ollama's API, which answer like those of OpenAI's."""

    prefix = "/api"

    def __init__(self, endpoints: Endpoints, pool: ModelPool) -> None:
        self._endpoints, self._pool = endpoints, pool
        self.router = router = APIRouter(prefix=self.prefix, include_in_schema=False, route_class=BodyRoute)
        router.api_route("/version", methods=["GET", "HEAD"])(self.version)
        router.api_route("/tags", methods=["GET", "HEAD"])(self.tags)
        router.post("/show")(self.show)
        router.get("/ps")(self.running)
        router.post("/embed")(self.embed)
        router.post("/chat")(self.chat)
        router.post("/generate")(self.generate)

    @staticmethod
    def error_body(error: APIError) -> dict[str, Any]:
        """Return the body of an error in the shape of this API."""
        return {"error": str(error)}

    async def version(self) -> dict[str, str]:
        """Return the version of this package."""
        return {"version": version("efficientllm")}

    def tags(self) -> dict[str, Any]:
        return {"models": [_card(name, self._pool.require(name)) for name in self._pool.names]}

    async def show(self, request: ModelName, http: Request) -> Response:
        """Return the shape of a model and what it can do."""
        name = self._name(request.model or request.name)
        artefact = self._pool.require(name)
        details = _details(artefact)
        information = {
            "general.architecture": details["family"],
            "general.parameter_count": artefact.description[1],
            f"{details['family']}.context_length": self._pool.context_length(name),
        }
        return JSONResponse({"details": details, "model_info": information, "capabilities": ["completion", "tools"]})

    async def running(self) -> dict[str, Any]:
        """List the loaded models."""
        models = []
        for name, worker in self._pool.loaded.items():
            card = _card(name, self._pool.artefacts[name])
            size = card["size"] + worker.engine.kv_cache_bytes
            left = self._pool.expires_in(name)
            seconds = min(max(left, 0), LONGEST_SECONDS)  # a date has no infinity
            until = datetime.now(UTC) + timedelta(seconds=seconds)
            more = {"size_vram": 0, "expires_at": until.isoformat(), "context_length": worker.engine.context_length}
            models.append({**card, "size": size, **more})
        return {"models": models}

    async def embed(self, request: OllamaEmbed, http: Request) -> Response:
        """Return an embedding for each text."""

        async def answer() -> OllamaEmbeddings:
            model = self._kept(request.model, request.keep_alive)
            fields = {"model": model, "input": request.input, "truncate": request.truncate}
            found = await self._endpoints.embed(EmbeddingsRequest.model_validate(fields))
            vectors: Any = [each.embedding for each in found.data]
            count = found.usage.prompt_tokens
            return OllamaEmbeddings(model=request.model, embeddings=vectors, prompt_eval_count=count)

        return await self._endpoints.until_disconnect(http, answer())

    async def chat(self, request: OllamaChat, http: Request) -> Response:
        """Answer a chat, or load or unload the model without messages."""
        return await self._answer(request, http)

    async def generate(self, request: OllamaPrompt, http: Request) -> Response:
        """Continue a prompt, or load or unload the model without one."""
        return await self._answer(request, http)

    async def _answer(self, request: OllamaRequest, http: Request) -> Response:
        name = self._kept(request.model, request.keep_alive)
        if request.is_load:
            unloads = request.keep_alive == 0
            # also to unload: the time that `_kept` has set starts when a request leaves
            if not unloads or self._pool.model_of(name) in self._pool.loaded:
                worker = await self._pool.enter(name, self._pool.deadline())
                worker.leave()
            else:
                self._pool.keep_by_default(name)
            reason = "unload" if unloads else "load"
            said: Any = {"message": OllamaMessage(content="")} if isinstance(request, OllamaChat) else {"response": ""}
            return JSONResponse(OllamaAnswer(model=request.model, **said, done=True, done_reason=reason).model_dump())
        completion = request.translation
        completion.model = name
        make_builder = partial(OllamaBuilder, completion, isinstance(request, OllamaChat))
        return await self._endpoints.answer(completion, make_builder, http)

    def _kept(self, name: str, keep_alive: float | None) -> str:
        """Return the name of a model, which stays loaded for `keep_alive` seconds after its next request, if given."""
        name = self._name(name)
        self._pool.require(name)
        if keep_alive is not None:
            self._pool.keep(name, keep_alive)
        return name

    def _name(self, name: str) -> str:
        """Return the name of a model without the tag that clients add."""
        return name if name in self._pool.names else name.removesuffix(DEFAULT_TAG)


def _details(artefact: Artefact) -> dict[str, Any]:
    family, num_parameters, kind = artefact.description
    return {
        "parent_model": "",
        "format": artefact.model_file.suffix.removeprefix("."),
        "family": family or "unknown",
        "families": [family or "unknown"],
        "parameter_size": format_count(num_parameters) if num_parameters else "",
        "quantization_level": kind.upper(),
    }


def _card(name: str, artefact: Artefact) -> dict[str, Any]:
    modified = datetime.fromtimestamp(artefact.model_file.stat().st_mtime, UTC).isoformat()
    tagged = name if ":" in name else name + DEFAULT_TAG
    described = {"size": artefact.file_bytes, "digest": artefact.sha256, "details": _details(artefact)}
    return {"name": tagged, "model": tagged, "modified_at": modified, **described}
