"""Turn a request into its choices, each with a generation, and fill in the server's sampling defaults."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

from ...runtime.base.errors import ContextOverflowError, EfficientLLMError
from ...runtime.call_reader import CallReader, ReasoningReader
from ...runtime.cautious_reader import CautiousReader
from ...runtime.engines.calibration import Calibration
from ...runtime.engines.scheduler import EngineScheduler
from ...runtime.generation import AnswerOptions, Generation, Overflow
from ...runtime.grammar import GrammarConstraint
from ...runtime.prompt import ChatPrompt, text_prompt, tool_prompt
from ...runtime.sampling import SamplingDefaults
from ..schemas.api_error import APIError, context_error
from ..schemas.completions import REASONING_VARIABLES, AnyPrompt, ChatRequest, CompletionRequest, TextRequest
from ..schemas.response_models import TokenPiece


@dataclass(frozen=True)
class Choice:
    """One of the answers to a request."""

    generation: Generation
    reader: CallReader | ReasoningReader | CautiousReader | None = None
    """Separates reasoning and calls from text. None if the answer can have neither."""
    echo: str = ""
    """Prompt that the answer begins with."""
    prompt: str = ""
    """Text of the prompt, if it is one."""

    def with_caution(self, calibration: Calibration, least: float, asked: str, is_agreed: bool) -> Choice:
        """Return this choice with a confidence of its calls, see `CautiousReader`."""
        if not isinstance(self.reader, CallReader | ReasoningReader):
            return self
        stats = self.generation.stats
        return replace(self, reader=CautiousReader(self.reader, stats, calibration, least, asked, is_agreed))


def make_choices(
    engine: EngineScheduler,
    request: CompletionRequest,
    overflow: Overflow,
    defaults: SamplingDefaults,
    measures_probability: bool = False,
) -> list[Choice]:
    """Return the choices of every prompt. APIError 400 if the engine refuses the request."""
    try:
        options = AnswerOptions(
            request.token_limit,
            defaults.fill(request.sampling),
            logit_bias=_biases(engine, request),
            stop=request.stops,
            top_logprobs=request.top_count,
            scores_prompt=isinstance(request, TextRequest) and request.echo and request.top_count is not None,
            overflow=overflow,
            measures_probability=measures_probability,
        )
        # each choice of a seeded request has its own random numbers
        seeds = [None if request.seed is None else request.seed + index for index in range(request.n)]
        each = [replace(options, sampling=replace(options.sampling, seed=seed)) for seed in seeds]
        # lists: an error of a later choice must be raised here, not when it is read
        if isinstance(request, ChatRequest):
            return list(_chat_choices(engine, request, each))
        assert isinstance(request, TextRequest)
        return list(_text_choices(engine, request, each))
    except ContextOverflowError as error:
        raise context_error(str(error), error.num_tokens, error.context_length) from error
    except EfficientLLMError as error:
        raise APIError(400, str(error)) from error


def _biases(engine: EngineScheduler, request: CompletionRequest) -> dict[int, float]:
    """Return {token: bias}. OpenAI's -100 forbids a token."""
    pairs = request.biases(partial(engine.tokenize, special=False))
    biases = {token: bias if bias > -100 else -float("inf") for token, bias in pairs}
    return biases | dict.fromkeys(engine.end_ids if request.ignore_eos else (), -float("inf"))


def prompt_of(engine: EngineScheduler, request: ChatRequest) -> ChatPrompt:
    """Return the prompt of a chat.

    The oldest turns are dropped if the request allows it, and what is left is less than the answer's limit and less
    than an eighth of the context window. System messages and the last turn stay. APIError 400 if it asks for reasoning
    that the chat template does not know.
    """
    known = engine.chat_template or ""
    if request.reasoning_effort not in (None, "none") and not any(name in known for name in REASONING_VARIABLES):
        raise APIError(400, "the chat template of this model knows no reasoning; remove reasoning_effort or think")
    messages = request.template_messages

    def after(turn: int) -> ChatPrompt:
        kept = [message for message in messages[:turn] if message["role"] == "system"] + messages[turn:]
        return tool_prompt(engine, kept, request.tool_use, request.template_variables)

    whole, window = after(0), engine.context_length
    if not request.may_drop_turns:
        return whole
    roles = [message["role"] for message in messages]
    begin = next((index for index, role in enumerate(roles) if role != "system"), 0)
    turns = [index for index in range(begin + 1, len(roles)) if roles[index] == "user"]
    # if no cut leaves the room, as much as fits
    for most in (window - min(request.token_limit, window // 8), window - 1):
        if len(whole.tokens) <= most:
            break
        first = bisect_left(turns, True, key=lambda turn: len(after(turn).tokens) <= most)
        if first < len(turns):
            return after(turns[first])
    return whole


def _chat_choices(engine: EngineScheduler, request: ChatRequest, each: Iterable[AnswerOptions]) -> Iterable[Choice]:
    prompt = prompt_of(engine, request)
    constraint = prompt.constraint(engine) if request.tool_use else _constraint_of(engine, request)
    stop_until = prompt.format.begin if request.tool_use else ""  # a stop text must not cut a call
    reader = partial(prompt.reader, is_free=request.tool_use is not None or constraint is None)
    for options in each:
        options = replace(options, stop_until=stop_until)
        yield Choice(Generation(engine, prompt.tokens, options, _copy_of(constraint)), reader())


def _text_choices(engine: EngineScheduler, request: TextRequest, each: Iterable[AnswerOptions]) -> Iterable[Choice]:
    constraint = _constraint_of(engine, request)
    for prompt in request.prompts:
        text = prompt if isinstance(prompt, str) else ""
        tokens = tokens_of(engine, prompt, "prompt", request.has_control_tokens)
        echo = (text or engine.text_of(tokens)) if request.echo else ""
        for options in each:
            generation = Generation(engine, tokens, options, _copy_of(constraint))
            yield Choice(generation, echo=echo, prompt=text)


def tokens_of(engine: EngineScheduler, prompt: AnyPrompt, name: str, has_control_tokens: bool = False) -> list[int]:
    """Return the tokens of a prompt. APIError 400 with the `name` of its field if there are none or unknown ones."""
    tokens: list[int] = []
    for part in [prompt] if isinstance(prompt, str) else prompt:
        if isinstance(part, int):
            tokens.append(part)
        elif part:  # only a prompt that starts with a text has a BOS token
            tokens += (
                engine.tokenize(part, special=has_control_tokens)
                if tokens
                else text_prompt(engine, part, has_control_tokens)
            )
    if not tokens:
        raise APIError(400, f"{name}: must not be empty")
    if max(tokens) >= engine.vocab_size:
        raise APIError(400, f"{name}: token {max(tokens)} is outside the vocabulary of {engine.vocab_size}")
    return tokens


def _constraint_of(engine: EngineScheduler, request: CompletionRequest) -> GrammarConstraint | None:
    """Return the constraint of the response format, None for any text. UsageError if the grammar is malformed."""
    grammar = request.response_format.grammar()
    return GrammarConstraint(engine, grammar) if grammar is not None else None


def _copy_of(constraint: GrammarConstraint | None) -> GrammarConstraint | None:
    # each answer advances its own
    return constraint.copy() if constraint is not None else None


def pieces_of(engine: EngineScheduler, tokens: Iterable[int]) -> list[TokenPiece]:
    """Return each of `tokens` with its text, or its bytes if they are a part of a character."""
    control = {engine.tokenize(text, special=True)[-1]: text.encode() for text in engine.control_texts}
    pieces = []
    for token in tokens:
        found = engine.token_bytes(token) or control.get(token, b"")
        try:
            pieces.append(TokenPiece(id=token, piece=found.decode()))
        except UnicodeDecodeError:
            pieces.append(TokenPiece(id=token, piece=list(found)))
    return pieces
