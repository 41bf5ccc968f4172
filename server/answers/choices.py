"""From a request to the generations that answer it, one for each choice.

How a server samples where a request says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from ...runtime.base.errors import ContextOverflowError, EfficientLLMError
from ...runtime.call_reader import CallReader
from ...runtime.engines.scheduler import EngineScheduler
from ...runtime.generation import AnswerOptions, Generation, Overflow
from ...runtime.grammar import GrammarConstraint
from ...runtime.prompt import ChatOptions, ChatPrompt, text_prompt, tool_prompt
from ...runtime.sampling import SamplingOptions
from ..schemas.completions import ChatRequest, CompletionRequest, TextRequest
from ..schemas.error import APIError


@dataclass(frozen=True)
class SamplingDefaults:
    """sampling, where a request says nothing; by default the model's own, else llama.cpp's"""

    temperature: float | None = None
    """0: always the most likely token."""
    top_k: int | None = None
    """Keep the k most likely tokens; 0: all."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probabilities reach this sum."""
    min_p: float | None = None
    """Drop tokens less likely than this share of the most likely one."""
    repetition_penalty: float | None = None
    """Divide the logits of tokens already in the sequence by this; 1: off."""

    def __post_init__(self) -> None:
        SamplingOptions(**asdict(self))  # which says what is wrong

    def fill(self, asked: SamplingOptions) -> SamplingOptions:
        """`asked`, with what it leaves open from here, as far as it is said here."""
        open_names = [
            name for name, value in asdict(self).items() if value is not None and getattr(asked, name) is None
        ]
        return replace(asked, **{name: getattr(self, name) for name in open_names})


@dataclass(frozen=True)
class Choice:
    """One of a request's answers."""

    generation: Generation
    reader: CallReader | None = None
    """Tells its calls from its text; None where there is nothing to call."""
    echo: str = ""
    """What it begins with."""


def choices_of(
    engine: EngineScheduler, request: CompletionRequest, overflow: Overflow, defaults: SamplingDefaults
) -> list[Choice]:
    """The choices of every prompt; APIError 400 where the engine refuses what is asked."""
    try:
        options = AnswerOptions(
            request.token_limit,
            defaults.fill(request.sampling),
            logit_bias=request.biases,
            stop=request.stops,
            top_logprobs=request.top_count,
            overflow=overflow,
        )
        # every choice of a seeded request draws its own numbers
        seeds = [None if request.seed is None else request.seed + index for index in range(request.n)]
        each = [replace(options, sampling=replace(options.sampling, seed=seed)) for seed in seeds]
        if isinstance(request, ChatRequest):
            return list(_chat_choices(engine, request, each))
        assert isinstance(request, TextRequest)
        return list(_text_choices(engine, request, each))
    except ContextOverflowError as error:
        raise APIError(400, str(error), code="context_length_exceeded") from error
    except EfficientLLMError as error:
        raise APIError(400, str(error)) from error


def _chat_choices(engine: EngineScheduler, request: ChatRequest, each: Iterable[AnswerOptions]) -> Iterable[Choice]:
    shown = ChatOptions(request.tool_use, request.chat_template_kwargs)
    prompt: ChatPrompt = tool_prompt(engine, [message.flat() for message in request.messages], shown)
    constraint = prompt.constraint(engine) if request.tool_use else _constraint_of(engine, request)
    stop_until = prompt.format.begin if request.tool_use else ""  # a part of a call is no call
    for options in each:
        options = replace(options, stop_until=stop_until)
        yield Choice(Generation(engine, prompt.tokens, options, _copy_of(constraint)), prompt.reader())


def _text_choices(engine: EngineScheduler, request: TextRequest, each: Iterable[AnswerOptions]) -> Iterable[Choice]:
    constraint = _constraint_of(engine, request)
    for prompt in request.prompts:
        tokens = text_prompt(engine, prompt) if isinstance(prompt, str) else prompt
        if not tokens:
            raise APIError(400, "prompt: is empty")
        if max(tokens) >= engine.vocab_size:
            raise APIError(400, f"prompt: token {max(tokens)} is outside the vocabulary of {engine.vocab_size}")
        echo = (prompt if isinstance(prompt, str) else text_of(engine, tokens)) if request.echo else ""
        for options in each:
            yield Choice(Generation(engine, tokens, options, _copy_of(constraint)), echo=echo)


def _constraint_of(engine: EngineScheduler, request: CompletionRequest) -> GrammarConstraint | None:
    """What the request says of its answers' form; UsageError where that is malformed."""
    grammar = request.response_format.grammar()
    return GrammarConstraint(engine, grammar) if grammar is not None else None


def _copy_of(constraint: GrammarConstraint | None) -> GrammarConstraint | None:
    return constraint.copy() if constraint is not None else None


def text_of(engine: EngineScheduler, tokens: Iterable[int]) -> str:
    """The text of `tokens`, control tokens left out."""
    return b"".join(map(engine.token_bytes, tokens)).decode("utf-8", errors="replace")
