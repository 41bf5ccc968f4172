"""Requests and errors of the endpoint, as OpenAI's clients send and expect them."""

from __future__ import annotations

import abc
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

MAX_MESSAGES = 512
MAX_CHARACTERS = 200_000
MAX_STOPS = 16
DEFAULT_TOKENS = 512


def _encodable(text: str) -> str:
    """Text that a tokenizer can take: no NUL, no half of a surrogate pair."""
    if "\0" in text:
        raise ValueError("text must not contain NUL")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("text must not contain lone surrogates") from error
    return text


Text = Annotated[str, Field(max_length=MAX_CHARACTERS), AfterValidator(_encodable)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_CHARACTERS)]


class _Request(BaseModel):
    """What clients send; a field that is null has its default."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if value is not None} if type(values) is dict else values


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    """OpenAI's newer models call their system messages the developer's."""
    content: Text | list[TextPart]

    def flat(self) -> dict[str, str]:
        """{"role", "content"} as chat templates know them, with the content as one string."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Request):
    include_usage: bool = False


class ResponseFormat(_Request):
    type: Literal["text", "json_object"] = "text"


UNSERVED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "modalities": (["text"],),
}
"""Fields of OpenAI's that would change the answer and are not served -> the values that ask for nothing."""


class CompletionRequest(_Request, abc.ABC):
    """What both endpoints take; null stands for the default.

    A field that is not served is refused where it would change the answer, unknown ones are ignored.
    """

    model: Text
    max_tokens: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 1.0
    n: Annotated[int, Field(ge=1, le=8)] = 1
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, values: Any) -> Any:
        for name, neutral in UNSERVED.items() if type(values) is dict else ():
            if values.get(name) is not None and values[name] not in neutral:
                raise ValueError(f"{name} is not served here; leave it out")
        return values

    @property
    def token_limit(self) -> int:
        """Tokens an answer may have."""
        return self.max_tokens or DEFAULT_TOKENS

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer, which they are no part of."""
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        return [text for text in stops if text]

    @property
    @abc.abstractmethod
    def top_count(self) -> int | None:
        """Log-probabilities wanted beside the chosen token's; None: none at all."""


class ChatRequest(CompletionRequest):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    response_format: ResponseFormat = ResponseFormat()

    @model_validator(mode="after")
    def _check_order(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError("messages: the last message must be the user's")
        return self

    @property
    def token_limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or DEFAULT_TOKENS

    @property
    def top_count(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class TextRequest(CompletionRequest):
    """POST /v1/completions"""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=16)] | Tokens
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    @property
    def token_limit(self) -> int:
        return self.max_tokens or 16

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts or token ids; each has `n` choices of its own."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], str):
            return [text for text in self.prompt if isinstance(text, str)]
        return [[token for token in self.prompt if isinstance(token, int)]]

    @property
    def top_count(self) -> int | None:
        return self.logprobs


class APIError(Exception):
    """An error answered in OpenAI's shape."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": None, "code": code}}
