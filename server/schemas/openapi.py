"""The OpenAPI document: what FastAPI derives, with this server's models, answers and errors.

The models below describe answers and do not make them: what is sent is built in `answers`, piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Answer):
    message: str
    type: str
    param: None
    code: str | None


class ErrorAnswer(_Answer):
    error: ErrorDetail


class PromptTokensDetails(_Answer):
    cached_tokens: int


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenChance(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TokenChance):
    top_logprobs: list[TokenChance]


class ChatLogprobs(_Answer):
    content: list[ChosenToken]
    refusal: None


class AnsweredFunction(_Answer):
    name: str
    arguments: str


class AnsweredCall(_Answer):
    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AssistantMessage(_Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: Annotated[list[AnsweredCall], Field(min_length=1)] = []
    """Absent where nothing is called."""


class ChatChoice(_Answer):
    message: AssistantMessage
    index: int
    finish_reason: ChatFinishReason
    logprobs: ChatLogprobs | None


class TextLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(_Answer):
    text: str
    index: int
    finish_reason: FinishReason
    logprobs: TextLogprobs | None


class _Completion(_Answer):
    id: str
    created: int
    model: str
    usage: Usage


class ChatCompletion(_Completion):
    """Answer of POST /v1/chat/completions without `stream`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(_Completion):
    """Answer of POST /v1/completions without `stream`."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class OutputText(_Answer):
    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[None]


class OutputMessage(_Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class OutputCall(_Answer):
    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Literal["completed", "incomplete"]


class OutputDetails(_Answer):
    reasoning_tokens: int


class ResponseUsage(_Answer):
    input_tokens: int
    input_tokens_details: PromptTokensDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseAnswer(BaseModel):
    """Answer of POST /v1/responses without `stream`; it repeats the request's fields, too."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    error: None
    output: list[OutputMessage | OutputCall]
    usage: ResponseUsage


class ModelCard(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    """vLLM's name for tokens that fit, prompt and answer together; null before a model that does not say is loaded."""


class ModelList(_Answer):
    object: Literal["list"]
    data: list[ModelCard]


class Embedding(_Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or their fp32 bytes in base64."""


class EmbeddingsUsage(_Answer):
    prompt_tokens: int
    total_tokens: int


class Embeddings(_Answer):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingsUsage


class Tokenized(_Answer):
    """Answer of POST /tokenize."""

    tokens: list[int]


class Detokenized(_Answer):
    """Answer of POST /detokenize."""

    content: str


class LoadedModel(_Answer):
    kv_cache_bytes: int


class Health(_Answer):
    """Bytes are of the whole server; the system may not tell all of them. Without the key no model is named."""

    status: Literal["ok"]
    in_flight: int
    loaded: dict[str, LoadedModel]
    peak_rss_bytes: int
    rss_bytes: int = 0
    rss_anon_bytes: int = 0
    rss_file_bytes: int = 0


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": ErrorAnswer}
    for status, text in {
        400: "the request is wrong",
        401: "the key is wrong",
        404: "no such model",
        408: "the answer took too long",
        413: "the body is too large",
        415: "the body does not say that it is JSON",
        429: "the queue is full",
        503: "the model does not fit",
    }.items()
}
"""Statuses other than 200, each with OpenAI's error body."""


def answer_or_events(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Responses of an endpoint that answers with `model`, or with server-sent events where `stream` is set."""
    events = {"text/event-stream": {}}  # OpenAPI 3.1 has no schema for single events
    return {200: {"description": "the answer, whole or as events", "model": model, "content": events}, **ERRORS}


def document(app: FastAPI, models: Iterable[str]) -> None:
    """Name the served models in the document and drop FastAPI's 422: wrong requests are answered with 400."""
    derive, names = app.openapi, list(models)

    def openapi() -> dict[str, Any]:
        schema = derive()
        for request in ("ChatRequest", "TextRequest", "ResponsesRequest", "EmbeddingsRequest") if names else ():
            schema["components"]["schemas"][request]["properties"]["model"] = {"type": "string", "enum": names}
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
