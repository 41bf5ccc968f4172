"""Request models of the endpoints for chats, texts, embeddings and tokens."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from ...runtime.base.errors import UsageError
from ...runtime.chat_template import Message
from ...runtime.copied_arguments import ToolArguments
from ...runtime.grammar import lark_of
from ...runtime.prompt import ToolUse, in_job
from ...runtime.sampling import REQUEST_RANGES, SamplingOptions
from .api_error import validation_message
from .messages import (
    MAX_CHARACTERS,
    MAX_TOOLS,
    Bool,
    ChatMessage,
    Float,
    Int,
    Json,
    NamedTool,
    RequestPart,
    ResponseFormat,
    Text,
    Tool,
    ToolChoiceOption,
)

MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_PROMPTS = 16
MAX_INPUTS = 2048
"""Most texts of an embeddings request. OpenAI has the same limit."""
DEFAULT_CHAT_TOKENS = 512
"""Most tokens of an answer to a request without a limit. page/assets/index.html has the same number."""
DEFAULT_TEXT_TOKENS = 16
MAX_TOKENS = 1_000_000
"""Most tokens of an answer. Where other APIs have no limit, the context window ends it first."""

TEMPLATE_VARIABLES = ("messages", "tools", "bos_token", "eos_token")
"""Variables of a chat template that a client may not set."""

REASONING_VARIABLES = ("enable_thinking", "reasoning_effort")
"""Variables of chat templates of models that reason."""

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

Token = Annotated[int, Field(ge=0, strict=True)]


def _check_token_key(text: str) -> str:
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", text):
        raise ValueError("must be the number of a token")
    return text


def _plain_text(value: Any) -> Any:
    """Return the text of llama-server's objects `prompt_string` and `content`, and any other value as it is."""
    if not isinstance(value, dict) or len(value) != 1:
        return value
    parts = value.get("content")
    if isinstance(parts, list) and all(isinstance(one, dict) and one.get("type") == "text" for one in parts):
        return "".join(str(one.get("text", "")) for one in parts)
    return value.get("prompt_string", value)


PlainText = Annotated[Text, BeforeValidator(_plain_text)]
Tokens = Annotated[list[Token | PlainText], Field(min_length=1, max_length=MAX_CHARACTERS, fail_fast=True)]
"""One prompt as token ids, between which llama-server also has texts."""
AnyPrompt = str | list[int | str]
Prompt = (
    PlainText
    | Annotated[list[Token | PlainText | Tokens], Field(min_length=1, max_length=MAX_CHARACTERS, fail_fast=True)]
)
"""A text, its tokens, or several of either."""


def _prompts_of(value: Any, name: str, limit: int) -> list[AnyPrompt]:
    """Return `value`, a `Prompt` of the field `name`, as a list. Raise ValueError for more than `limit`."""
    is_one = isinstance(value, str) or any(isinstance(each, int) for each in value)
    if not is_one and len(value) > limit:
        raise ValueError(f"{name}: has {len(value)} texts; the limit is {limit}")
    prompts: Any = [value] if is_one else value
    return prompts


TokenKey = Annotated[str, AfterValidator(_check_token_key)]
"""A token id as a key of a JSON object."""
Bias = Annotated[Float, Field(ge=-100, le=100)]
TopP = Annotated[Float, Field(ge=0, le=1), AfterValidator(lambda value: max(value, REQUEST_RANGES["top_p"][0]))]
"""0 asks for the most likely token."""


def in_range(name: str) -> Any:
    """Return the check of a sampling number's range."""
    low, high = REQUEST_RANGES[name]
    return Field(ge=low, le=high)


class StreamOptions(RequestPart):
    include_usage: Bool = False
    include_obfuscation: Literal[False] = False


NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "best_of": (1,),
    "modalities": (["text"],),
    "store": (False,),
    "background": (False,),
    "reasoning_effort": ("none",),
    "top_logprobs": (0,),
    "stream_options": ({}, {"include_obfuscation": False}),
    **dict.fromkeys(("mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range"), (0, 0.0)),
    **dict.fromkeys(("typical_p", "typ_p", "tfs_z"), (1, 1.0)),
    **dict.fromkeys(("post_sampling_probs", "verbose", "backend_sampling"), (False,)),
    **dict.fromkeys(("min_keep", "n_indent"), (0,)),
    "top_n_sigma": (-1, -1.0),
    "n_cmpl": (1,),
    "t_max_predict_ms": (0, -1),
    "reasoning_format": ("auto", "deepseek"),
    "parse_tool_calls": (True,),
}
"""Fields of OpenAI, llama.cpp and Ollama that are not served, each with the values that request nothing."""

WITHOUT_EFFECT = (
    *("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("prediction", "verbosity"),
)
"""OpenAI's fields that name the user or a priority. The answer is the same without them."""

LLAMA_WITHOUT_EFFECT = (
    *("cache_prompt", "id_slot", "n_keep", "n_discard", "n_cache_reuse", "repeat_last_n", "penalize_nl"),
    *("mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
    *("xtc_threshold", "dynatemp_exponent", "samplers", "sse_ping_interval", "return_progress"),
)
"""Fields of llama.cpp about its caches, its slots and samplers that are off. The order of the samplers is our own."""

ALTERNATIVES = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "max_output_tokens": "use max_tokens",
    "guided_json": "use response_format with type json_schema",
    "guided_regex": "use response_format with type regex",
    "guided_grammar": "use response_format with type lark",
}
"""Names that other servers have for fields that are served here."""


def is_listed_neutral(name: str, value: Any) -> bool:
    """Return whether NEUTRAL_VALUES lists `value` for a field."""
    return any(type(value) is type(each) and value == each for each in NEUTRAL_VALUES.get(name, ()))


class RequestBody(RequestPart):
    """A whole request body. Unknown fields are refused unless NEUTRAL_VALUES lists their value."""

    without_effect = (*WITHOUT_EFFECT, *LLAMA_WITHOUT_EFFECT)

    @classmethod
    def is_neutral(cls, name: str, value: Any) -> bool:
        return value is None or is_listed_neutral(name, value)

    @classmethod
    def remedy(cls, name: str) -> str:
        return ALTERNATIVES.get(name, "remove it")


class CompletionRequest(RequestBody, abc.ABC):
    """The fields of both completion endpoints. Null means the default, which for sampling is the model's own."""

    model: Text = ""
    """May be left out if the server has one model."""
    max_tokens: Annotated[Int | None, Field(ge=1, le=MAX_TOKENS)] = None
    temperature: Annotated[Float | None, in_range("temperature")] = None
    top_p: TopP | None = None
    top_k: Annotated[Int | None, in_range("top_k")] = None
    min_p: Annotated[Float | None, in_range("min_p")] = None
    repetition_penalty: Annotated[Float | None, in_range("repetition_penalty")] = None
    frequency_penalty: Annotated[Float, in_range("frequency_penalty")] = 0.0
    presence_penalty: Annotated[Float, in_range("presence_penalty")] = 0.0
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024)] = Field({})
    n: Annotated[Int, Field(ge=1, le=8)] = 1
    seed: Annotated[Int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: Bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat = ResponseFormat()
    ignore_eos: Bool = False
    """Whether the end tokens are forbidden."""
    timings_per_token: Bool = False
    """Whether each event has `timings`."""

    @model_validator(mode="before")
    @classmethod
    def _rename_llama_fields(cls, values: Any) -> Any:
        """Replace the fields that llama-server adds to OpenAI's API by those with the same meaning."""
        if type(values) is not dict:
            return values
        values = dict(values)
        for other, name in (("n_predict", "max_tokens"), ("repeat_penalty", "repetition_penalty")):
            if values.get(name) is None and other in values:
                values[name] = values.pop(other)
        if values.get("max_tokens") == -1:
            values["max_tokens"] = MAX_TOKENS
        grammar, schema = values.pop("grammar", None), values.pop("json_schema", None)
        if grammar and (schema is not None or values.get("response_format")):
            raise ValueError("grammar: cannot be combined with json_schema or response_format; remove one")
        if schema is not None:
            values["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
        elif grammar:
            if not isinstance(grammar, str):
                raise ValueError("grammar: must be a text")
            try:
                values["response_format"] = {"type": "lark", "lark": lark_of(grammar)}
            except UsageError as error:
                raise ValueError(str(error)) from error
        return values

    @model_validator(mode="after")
    def _check_stream(self) -> CompletionRequest:
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options.include_usage: needs stream")
        return self

    @property
    def sampling(self) -> SamplingOptions:
        """Return the sampling options, None for those that the client does not set."""
        names = {field.name for field in dataclasses.fields(SamplingOptions)}
        return SamplingOptions(**self.model_dump(include=names))

    def biases(self, tokenize: Callable[[str], list[int]]) -> list[tuple[int, float]]:
        """Return pairs of a token and its bias."""
        return [(int(token), bias) for token, bias in self.logit_bias.items()]

    @property
    def token_limit(self) -> int:
        """Return the most tokens of an answer."""
        return self.max_tokens or DEFAULT_CHAT_TOKENS

    @property
    def stops(self) -> list[str]:
        """Return texts that end the answer and are not part of it."""
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        return [text for text in stops if text]

    @property
    @abc.abstractmethod
    def top_count(self) -> int | None:
        """Return the requested number of most likely tokens with log-probabilities, None for no log-probabilities."""


class TranslatedRequest(RequestPart):
    """A request of another API. Its translation is checked with it, and kept."""

    _translation: CompletionRequest = PrivateAttr()

    def translate(self) -> CompletionRequest:
        """Return the request of OpenAI's API with the same meaning."""
        raise NotImplementedError

    @staticmethod
    def refusal(error: ValidationError) -> str:
        """Return the message for an `error` of the translation."""
        return validation_message(error.errors())

    @model_validator(mode="after")
    def _keep_translation(self) -> TranslatedRequest:
        try:
            self._translation = self.translate()
        except ValidationError as error:  # the text of `error` has several lines
            raise ValueError(self.refusal(error)) from error
        return self

    @property
    def translation(self) -> Any:
        """Return the request of OpenAI's API with the same meaning, which was checked with this one."""
        return self._translation


class LlamaSampling(RequestPart):
    """Sampling options by the names that llama.cpp and Ollama have for them."""

    without_effect = LLAMA_WITHOUT_EFFECT
    temperature: Float | None = None
    top_k: Int | None = None
    top_p: Float | None = None
    min_p: Float | None = None
    repeat_penalty: Float | None = None
    presence_penalty: Float = 0.0
    frequency_penalty: Float = 0.0
    stop: Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)] | Text = Field(default=[])

    @classmethod
    def is_neutral(cls, name: str, value: Any) -> bool:
        return super().is_neutral(name, value) or is_listed_neutral(name, value)


class ChatRequest(CompletionRequest):
    """POST /v1/chat/completions. If the last message is the assistant's, the answer continues it."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[Int | None, Field(ge=1, le=MAX_TOKENS)] = None
    logprobs: Bool = False
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] = 0
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field([])
    tool_choice: ToolChoiceOption = "auto"
    parallel_tool_calls: Bool = True
    tool_arguments: ToolArguments = "any"
    """copy: free texts in arguments are runs of words of the messages, or examples of their schemas. examples: those
    with examples are examples that occur in the messages. listed: see ToolArguments."""
    reasoning_effort: ReasoningEffort | None = None
    """Sets enable_thinking of the chat template, false for none, and its variable reasoning_effort."""
    chat_template_kwargs: Json = Field({})
    """Further variables of the chat template, such as enable_thinking."""
    add_generation_prompt: Bool | None = None
    continue_final_message: Bool | None = None
    """Names of vLLM and llama-server for what follows from the role of the last message."""

    _job: str = PrivateAttr("")
    _may_drop_turns: bool = PrivateAttr(False)

    @property
    def may_drop_turns(self) -> bool:
        """Return True if the oldest turns are dropped from a conversation that does not fit."""
        return self._may_drop_turns

    def allow_dropping(self, is_allowed: bool) -> ChatRequest:
        """Set whether the oldest turns may be dropped, and return this request."""
        self._may_drop_turns = is_allowed
        return self

    def set_job(self, job: str) -> None:
        """Set the name of the job that the system message begins with."""
        self._job = job

    @property
    def template_messages(self) -> list[Message]:
        """Return the messages for the chat template."""
        return in_job([message.as_template_value() for message in self.messages], self._job)

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name; rename one")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: there is no function {self.tool_choice.function.name!r} in tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: required needs tools")
        if self.tool_use is not None and self.response_format.type in ("regex", "lark"):
            raise ValueError(f"response_format: {self.response_format.type} cannot be combined with tools")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs")
        continues = self.messages[-1].role == "assistant"
        implied = {"add_generation_prompt": not continues, "continue_final_message": continues}
        given = self.model_dump(include={*implied}, exclude_none=True)
        for name, value in {**given, **self.chat_template_kwargs}.items():
            if name in TEMPLATE_VARIABLES or implied.get(name, value) != value:
                field = name if name in given else f"chat_template_kwargs: {name}"
                raise ValueError(f"{field} is set by the other fields and the model; remove it")
        return self

    @property
    def template_variables(self) -> dict[str, Any]:
        """Return the further variables of the chat template."""
        effort = self.reasoning_effort
        implied = {} if effort is None else {"enable_thinking": effort != "none", "reasoning_effort": effort}
        return {**implied, **self.chat_template_kwargs}

    @cached_property
    def _functions(self) -> list[dict[str, Any]]:
        return [tool.model_dump() for tool in self.tools]

    @property
    def tool_use(self) -> ToolUse | None:
        """Return the functions that the answer may call, None if there are none."""
        if not self.tools or self.tool_choice == "none":
            return None
        only = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else ""
        otherwise = self.response_format.answer_schema()
        must_call, arguments = self.tool_choice == "required", self.tool_arguments
        return ToolUse(self._functions, must_call, only, self.parallel_tool_calls, otherwise, arguments)

    @property
    def stops(self) -> list[str]:
        """Return no texts if the answer must be calls, because a part of a call is not a call."""
        tools = self.tool_use
        return [] if tools is not None and (tools.must_call or tools.only) else super().stops

    @property
    def token_limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or DEFAULT_CHAT_TOKENS

    @property
    def top_count(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class TextRequest(CompletionRequest):
    """POST /v1/completions."""

    has_control_tokens: ClassVar[bool] = False
    """True if text such as <|im_end|> in a prompt is a control token."""
    prompt: Prompt
    max_tokens: Annotated[Int | None, Field(ge=0, le=MAX_TOKENS)] = None
    """0: the prompt is only evaluated."""
    logprobs: Annotated[Int | None, Field(ge=0, le=20)] = None
    echo: Bool = False
    """Whether the answer begins with the prompt, `logprobs` included."""

    @model_validator(mode="after")
    def _check_prompts(self) -> TextRequest:
        _ = self.prompts
        return self

    @property
    def token_limit(self) -> int:
        return DEFAULT_TEXT_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[AnyPrompt]:
        """Return texts or token ids. Each has `n` choices of its own."""
        return _prompts_of(self.prompt, "prompt", MAX_PROMPTS)

    @property
    def top_count(self) -> int | None:
        return self.logprobs


class TokenizeRequest(RequestBody):
    """POST /tokenize."""

    model: Text = ""
    content: Text
    add_special: Bool = False
    """Whether to begin with the model's BOS token, if it adds one."""
    parse_special: Bool = True
    """Whether text such as <|im_end|> becomes its control token."""
    with_pieces: Bool = False
    """True to return the text of each token as well, as bytes if it is a part of a character."""


class DetokenizeRequest(RequestBody):
    """POST /detokenize."""

    model: Text = ""
    tokens: Annotated[list[Token], Field(max_length=MAX_CHARACTERS, fail_fast=True)]


class EmbeddingsRequest(RequestBody):
    """POST /v1/embeddings."""

    model: Text = ""
    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "last"] = "mean"
    """The mean of the states of all tokens, or the state of the last one."""
    truncate: Bool = False
    """True if the end of a text that does not fit is cut off."""

    @model_validator(mode="after")
    def _check_texts(self) -> EmbeddingsRequest:
        _ = self.texts
        return self

    @property
    def texts(self) -> list[AnyPrompt]:
        """Return texts or token ids."""
        return _prompts_of(self.input, "input", MAX_INPUTS)
