"""Requests for chats, texts and tokens, as OpenAI's clients send them."""

from __future__ import annotations

import abc
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ...runtime.prompt import ToolUse
from ...runtime.sampling import SamplingOptions
from .messages import (
    MAX_CHARACTERS,
    MAX_TOOLS,
    Bool,
    ChatMessage,
    Float,
    Int,
    Json,
    NamedTool,
    ResponseFormat,
    Sent,
    Text,
    Tool,
    ToolChoice,
)

MAX_MESSAGES = 512
MAX_STOPS = 16
MAX_PROMPTS = 16
DEFAULT_TOKENS = 512
LEAST_TOP_P = 1e-30

TEMPLATE_VALUES = ("messages", "tools", "bos_token", "eos_token")
"""Variables of a chat template that are not the client's to set."""

Token = Annotated[int, Field(ge=0, strict=True)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=MAX_CHARACTERS)]


def _token_text(text: str) -> str:
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", text):
        raise ValueError("must be a token's number")
    return text


TokenText = Annotated[str, AfterValidator(_token_text)]
"""A key of JSON."""
Bias = Annotated[Float, Field(ge=-100, le=100)]


class StreamOptions(Sent):
    include_usage: Bool = False
    include_obfuscation: Literal[False] = False


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "best_of": (1,),
    "modalities": (["text"],),
    "store": (False,),
    "background": (False,),
    "reasoning_effort": ("none",),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}),
    "top_logprobs": (0,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "with_pieces": (False,),
}
"""Fields of OpenAI's that are not served -> the values that ask for nothing."""

WITHOUT_EFFECT = (
    *("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "prediction",
)
"""Fields of OpenAI's that say who asks, or how fast it may be: the answer is the same without them."""

INSTEAD = {
    "functions": "say tools",
    "function_call": "say tool_choice",
    "max_output_tokens": "say max_tokens",
    "grammar": "say response_format with type lark",
    "json_schema": "say response_format with type json_schema",
    "guided_json": "say response_format with type json_schema",
    "guided_regex": "say response_format with type regex",
    "guided_grammar": "say response_format with type lark",
}
"""Names that other servers have for what this one has, too."""


class Asked(Sent):
    """A body; of its fields only those of NEUTRAL may be there for nothing."""

    without_effect = WITHOUT_EFFECT

    @classmethod
    def asks_for_nothing(cls, name: str, value: Any) -> bool:
        return value is None or any(type(value) is type(each) and value == each for each in NEUTRAL.get(name, ()))

    @classmethod
    def instead_of(cls, name: str) -> str:
        return INSTEAD.get(name, "leave it out")


class CompletionRequest(Asked, abc.ABC):
    """What both endpoints take; null stands for the default, which for sampling is the model's own."""

    model: Text
    max_tokens: Annotated[Int | None, Field(ge=1, le=1_000_000)] = None
    temperature: Annotated[Float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[Float | None, Field(ge=LEAST_TOP_P, le=1)] = None
    top_k: Annotated[Int | None, Field(ge=0, le=1_000_000)] = None
    min_p: Annotated[Float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[Float | None, Field(ge=0.01, le=100)] = None
    frequency_penalty: Annotated[Float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[Float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[TokenText, Bias], Field(max_length=1024)] = Field({})
    n: Annotated[Int, Field(ge=1, le=8)] = 1
    seed: Int | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stream: Bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat = ResponseFormat()

    @model_validator(mode="after")
    def _check_stream(self) -> CompletionRequest:
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options.include_usage: goes with stream")
        return self

    @property
    def sampling(self) -> SamplingOptions:
        """How tokens are drawn; what the client leaves open is None."""
        return SamplingOptions(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            seed=self.seed,
        )

    @property
    def biases(self) -> dict[int, float]:
        """{token: bias}; OpenAI's -100 forbids a token."""
        return {int(token): bias if bias > -100 else -float("inf") for token, bias in self.logit_bias.items()}

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
    """POST /v1/chat/completions; where the last message is the assistant's, the answer goes on with it."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[Int | None, Field(ge=1, le=1_000_000)] = None
    logprobs: Bool = False
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] = 0
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = Field([])
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: Bool = True
    chat_template_kwargs: Json = Field({})
    """Further variables of the chat template, such as enable_thinking."""

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have one name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: there is no function {self.tool_choice.function.name!r} in tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: required needs tools")
        if self.tool_use is not None and self.response_format.type in ("regex", "lark"):
            raise ValueError(f"response_format: {self.response_format.type} does not go with tools")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs")
        goes_on = self.messages[-1].role == "assistant"
        said = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        for name, value in self.chat_template_kwargs.items():
            if name in TEMPLATE_VALUES or said.get(name, value) != value:
                raise ValueError(f"chat_template_kwargs: {name} is what the other fields and the model make it")
        return self

    @property
    def tool_use(self) -> ToolUse | None:
        """What the answer may call."""
        if not self.tools or self.tool_choice == "none":
            return None
        only = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else ""
        tools = [tool.shown() for tool in self.tools]
        otherwise = self.response_format.schema_of_answer()
        return ToolUse(tools, self.tool_choice == "required", only, self.parallel_tool_calls, otherwise)

    @property
    def stops(self) -> list[str]:
        """None where an answer can only be calls: they are no text, and a part of one is no call."""
        tools = self.tool_use
        return [] if tools is not None and (tools.must_call or tools.only) else super().stops

    @property
    def token_limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or DEFAULT_TOKENS

    @property
    def top_count(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class TextRequest(CompletionRequest):
    """POST /v1/completions"""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: Annotated[Int | None, Field(ge=0, le=20)] = None
    echo: Bool = False
    """Begin the answer with the prompt."""

    @model_validator(mode="after")
    def _check_echo(self) -> TextRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs: the prompt's, which echo asks for, are not served here")
        return self

    @property
    def token_limit(self) -> int:
        return self.max_tokens or 16

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts or token ids; each has `n` choices of its own."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    @property
    def top_count(self) -> int | None:
        return self.logprobs


class TokenizeRequest(Asked):
    """POST /tokenize"""

    model: Text = ""
    content: Text
    add_special: Bool = False
    """Begin with the token that the model's texts begin with, if they do."""
    parse_special: Bool = True
    """Let text such as <|im_end|> be its control token."""


class DetokenizeRequest(Asked):
    """POST /detokenize"""

    model: Text = ""
    tokens: Annotated[list[Token], Field(max_length=MAX_CHARACTERS)]
