"""Response models: the definition of the JSON of answers in OpenAI's APIs. The other dialects have theirs beside them.

The OpenAPI document is derived from these models, and answers are sent from their instances. A field is sent in the
order of its definition.
"""

from __future__ import annotations

import operator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]

UNLESS_NONE: Any = Field(exclude_if=lambda value: value is None)
UNLESS_EMPTY: Any = Field(exclude_if=operator.not_)
"""Mark a field that is not sent while its value is empty or 0."""


class ResponseModel(BaseModel):
    # a field with a default is required in the document, because it is always sent
    model_config = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=True)


class ErrorDetail(ResponseModel):
    message: str
    type: str
    param: None = None
    code: str | None
    n_prompt_tokens: Annotated[int, UNLESS_EMPTY] = 0
    n_ctx: Annotated[int, UNLESS_EMPTY] = 0
    """Tokens of a prompt that does not fit, and of the context window."""


class ErrorAnswer(ResponseModel):
    error: ErrorDetail


class PromptTokensDetails(ResponseModel):
    cached_tokens: int


class CompletionTokensDetails(ResponseModel):
    passes: int
    """Passes of the model. Fewer than tokens if a grammar forces some or proposals were right."""
    accepted_prediction_tokens: int
    """Proposed tokens that became part of the answer."""
    rejected_prediction_tokens: int
    """Proposed tokens that a pass checked in vain."""


class Usage(ResponseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Timings(ResponseModel):
    """Counts and times of one choice by llama-server's names."""

    cache_n: int
    """Tokens of the prompt that were cached."""
    prompt_n: int
    """Tokens of the prompt that were evaluated."""
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    draft_n: int
    draft_n_accepted: int
    confidence: Annotated[float | None, UNLESS_NONE] = None
    """Probability that the calls are right, in the last event of an answer with calls of a calibrated model."""


class TokenCount(ResponseModel):
    """Answer of POST /v1/chat/completions/input_tokens."""

    input_tokens: int


class CandidateToken(ResponseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(CandidateToken):
    top_logprobs: list[CandidateToken]


class ChatLogprobs(ResponseModel):
    content: list[ChosenToken]
    refusal: None = None


class AnsweredFunction(ResponseModel):
    name: str
    arguments: str


class AnsweredCall(ResponseModel):
    id: str
    type: Literal["function"] = "function"
    function: AnsweredFunction


class AssistantMessage(ResponseModel):
    role: Literal["assistant"] = "assistant"
    reasoning_content: Annotated[str, UNLESS_EMPTY] = ""
    """Reasoning before the answer, if the model and its chat template have it."""
    content: str | None
    refusal: None = None
    tool_calls: Annotated[list[AnsweredCall], UNLESS_EMPTY, Field(json_schema_extra={"minItems": 1})] = []


class ChatChoice(ResponseModel):
    message: AssistantMessage
    index: int
    finish_reason: ChatFinishReason
    logprobs: ChatLogprobs | None


class TextLogprobs(ResponseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    """Null for the first token of a prompt, which nothing precedes, as in `top_logprobs`."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(ResponseModel):
    text: str
    index: int
    finish_reason: FinishReason
    logprobs: TextLogprobs | None


class Completion(ResponseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    timings: Timings
    """Those of the first choice."""


class ChatCompletion(Completion):
    """Answer of POST /v1/chat/completions without `stream`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class TextCompletion(Completion):
    """Answer of POST /v1/completions without `stream`."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage


class OutputText(ResponseModel):
    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[None] = []
    logprobs: list[None] = []


class OutputMessage(ResponseModel):
    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []
    status: ItemStatus = "in_progress"


class OutputCall(ResponseModel):
    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: ItemStatus = "in_progress"


class OutputTokensDetails(ResponseModel):
    reasoning_tokens: int = 0


class ResponseUsage(ResponseModel):
    input_tokens: int
    input_tokens_details: PromptTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class ResponseAnswer(ResponseModel):
    """Answer of POST /v1/responses without `stream`. From `instructions` to `truncation` it repeats the request."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    model: str
    status: ItemStatus
    incomplete_details: dict[str, str] | None
    error: None = None
    output: list[OutputMessage | OutputCall]
    instructions: str | None
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    truncation: str
    metadata: dict[str, str] = {}
    previous_response_id: None = None
    store: bool = False
    usage: ResponseUsage | None
    """Null while the answer is in progress."""


class ModelCard(ResponseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "efficientllm"
    max_model_len: int | None
    """Tokens that fit, prompt and answer together. Null until a model is loaded whose file does not tell it.

    The name is vLLM's.
    """


class ModelList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Embedding(ResponseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """Numbers, or their fp32 bytes in base64."""


class EmbeddingsUsage(ResponseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(ResponseModel):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingsUsage


class TokenPiece(ResponseModel):
    id: int
    piece: str | list[int]


class Tokenized(ResponseModel):
    """Answer of POST /tokenize."""

    tokens: list[int] | list[TokenPiece]


class Detokenized(ResponseModel):
    """Answer of POST /detokenize."""

    content: str


class LoadedModel(ResponseModel):
    kv_cache_bytes: int


class Health(ResponseModel):
    """Bytes are of the whole server. Outside Linux only the peak is known. Without the key no model is named."""

    status: Literal["ok", "loading"] = "ok"
    in_flight: int
    loaded: dict[str, LoadedModel]
    peak_rss_bytes: int
    rss_bytes: Annotated[int, UNLESS_EMPTY] = 0
    rss_anon_bytes: Annotated[int, UNLESS_EMPTY] = 0
