"""llama-server's own API: POST /completion and /apply-template, GET /props. Fields are those of llama.cpp's README.

Unlike a prompt of OpenAI's API, that of /completion may have control tokens, because /apply-template writes them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from ..runtime.base.errors import UsageError
from ..runtime.engines.scheduler import EngineScheduler
from ..runtime.generation import Generation
from ..runtime.grammar import lark_of
from ..runtime.sampling import SamplingOptions
from .answers.builders import TextBuilder, with_first
from .answers.choices import Choice, prompt_of
from .body import BodyRoute
from .endpoints import Endpoints
from .models.metrics import AnswerClock
from .models.pool import ModelPool
from .models.worker import Piece
from .schemas.api_error import APIError
from .schemas.completions import (
    MAX_TOKENS,
    ChatRequest,
    LlamaSampling,
    Prompt,
    TextRequest,
    Token,
    TokenKey,
    TranslatedRequest,
)
from .schemas.messages import Bool, Float, Int, Json, Text
from .schemas.response_models import ResponseModel

RANDOM_SEEDS = (-1, 2**32 - 1)
"""Values of `seed` that ask for random numbers."""


class PlainRequest(TextRequest):
    """A text completion whose prompts may have control tokens."""

    has_control_tokens: ClassVar[bool] = True


class LlamaCompletion(LlamaSampling, TranslatedRequest):
    """POST /completion."""

    without_effect = (
        *("cache_prompt", "id_slot", "n_keep", "n_discard", "n_cache_reuse", "samplers", "timings_per_token"),
        *("repeat_last_n", "penalize_nl", "sse_ping_interval", *LlamaSampling.without_effect),
    )
    values_off: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **LlamaSampling.values_off,
        **dict.fromkeys(("ignore_eos", "post_sampling_probs", "return_progress"), (False,)),
        **dict.fromkeys(("n_probs", "min_keep", "n_indent"), (0,)),
        "n_cmpl": (1,),
        "t_max_predict_ms": (0, -1),
    }
    model: Text = ""
    prompt: Prompt
    n_predict: Annotated[Int, Field(ge=-1, le=MAX_TOKENS)] = -1
    """Most tokens of the answer. -1: until the context is full. 0: the prompt is evaluated for later requests."""
    max_tokens: Annotated[Int | None, Field(ge=-1, le=MAX_TOKENS)] = None
    """Another name of `n_predict`."""
    seed: Int = -1
    stream: Bool = False
    grammar: Text = ""
    """A grammar in llama.cpp's GBNF, or in Lark's syntax."""
    json_schema: Json | None = None
    logit_bias: (
        Annotated[list[tuple[Token, Float | Literal[False]]], Field(max_length=1024, fail_fast=True)]
        | Annotated[dict[TokenKey, Float | Literal[False]], Field(max_length=1024)]
    ) = Field(default=[])
    return_tokens: Bool = False

    @property
    def limit(self) -> int:
        """Return the most tokens of the answer, -1 without a limit."""
        return self.n_predict if self.max_tokens is None else self.max_tokens

    def translate(self) -> PlainRequest:
        biases = {}
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias
        for token, bias in pairs:
            # -100 forbids a token in OpenAI's API, false in this one, which has no limits of numbers
            biases[str(token)] = -100 if bias is False else max(-100, min(100, bias))
        values = self.model_dump(include={"model", "prompt", "top_p", "min_p", "stop", "stream"})
        values |= self.model_dump(include={"presence_penalty", "frequency_penalty"})
        values |= {
            "max_tokens": MAX_TOKENS if self.limit < 0 else max(1, self.limit),
            "temperature": None if self.temperature is None else max(0.0, self.temperature),
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "repetition_penalty": self.repeat_penalty,
            "seed": None if self.seed in RANDOM_SEEDS else self.seed,
            "logit_bias": biases,
        }
        if self.grammar and self.json_schema is not None:
            raise ValueError("grammar: cannot be combined with json_schema; remove one")
        if self.json_schema is not None:
            values["response_format"] = {"type": "json_schema", "json_schema": {"schema": self.json_schema}}
        if self.grammar:
            try:
                values["response_format"] = {"type": "lark", "lark": lark_of(self.grammar)}
            except UsageError as error:
                raise ValueError(str(error)) from error
        return PlainRequest.model_validate(values)


class Timings(ResponseModel):
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


class LlamaAnswer(ResponseModel):
    """The answer to one prompt, or the last event of its stream."""

    index: int
    content: str
    tokens: list[int]
    stop: bool = True
    model: str
    prompt: str
    generation_settings: dict[str, Any]
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    truncated: bool
    stop_type: Literal["eos", "limit", "word"]
    stopping_word: str
    timings: Timings


class LlamaBuilder(TextBuilder):
    """Builds the answer to a /completion request, whole or as events."""

    def __init__(self, asked: LlamaCompletion, choices: Sequence[Choice], clock: AnswerClock) -> None:
        super().__init__(asked.translation, choices, clock)
        self._asked = asked

    async def whole(self, pieces: AsyncGenerator[Piece]) -> Any:
        """Return the answer in one object, after the last piece, or a list of answers to several prompts."""
        texts = [""] * len(self.choices)
        async for piece in pieces:
            texts[piece.choice] += piece.text
        answers = [self._answer(index, text) for index, text in enumerate(texts)]
        return answers[0] if len(answers) == 1 else JSONResponse([answer.model_dump() for answer in answers])

    async def events(self, first: Piece | None, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[str]:
        """Yield server-sent events of `first` and of the rest of `pieces`."""
        try:
            async for piece in with_first(first, pieces):
                if piece.is_ping:
                    yield self.ping
                elif piece.finish_reason:
                    yield f"data: {self._answer(piece.choice, '').model_dump_json()}\n\n"
                elif self._asked.limit:
                    stats = self.choices[piece.choice].generation.stats
                    counts = {"tokens_predicted": piece.tokens, "tokens_evaluated": stats.prompt_tokens}
                    said = {"index": piece.choice, "content": piece.text, "tokens": [], "stop": False}
                    yield f"data: {json.dumps(said | counts)}\n\n"
        except APIError as error:
            yield f"data: {json.dumps(error.body)}\n\n"

    def _answer(self, index: int, text: str) -> LlamaAnswer:
        # the engine always chooses a token, which an answer of at most 0 tokens does not show
        generation, is_empty = self.choices[index].generation, not self._asked.limit
        stats = generation.stats
        count = 0 if is_empty else stats.completion_tokens
        if generation.text.stopped:
            stop_type = "word"
        else:
            stop_type = "limit" if stats.finish_reason == "length" or is_empty else "eos"
        settings = _settings(generation.sampler.options, generation) | {"grammar": self._asked.grammar}
        prompt_ms, predicted_ms = stats.time_to_first_token_ms, 1e3 * stats.decode_seconds
        timings = Timings(
            cache_n=stats.cached_tokens,
            prompt_n=stats.prefilled_tokens,
            prompt_ms=prompt_ms,
            prompt_per_token_ms=prompt_ms / max(1, stats.prefilled_tokens),
            prompt_per_second=stats.prefill_tokens_per_second,
            predicted_n=count,
            predicted_ms=predicted_ms,
            predicted_per_token_ms=predicted_ms / max(1, count - stats.first_tokens),
            predicted_per_second=stats.decode_tokens_per_second,
            draft_n=stats.drafted_tokens,
            draft_n_accepted=stats.accepted_tokens,
        )
        return LlamaAnswer(
            index=index,
            content="" if is_empty else text,
            tokens=generation.answer if self._asked.return_tokens and not is_empty else [],
            model=self.base["model"],
            prompt=self.choices[index].prompt,
            generation_settings=settings,
            tokens_predicted=count,
            tokens_evaluated=stats.prompt_tokens,
            tokens_cached=stats.cached_tokens,
            truncated=stats.prompt_tokens + count > generation.engine.context_length,
            stop_type=stop_type,
            stopping_word=generation.text.found,
            timings=timings,
        )


def _settings(sampling: SamplingOptions, generation: Generation | None = None) -> dict[str, Any]:
    """Return sampling options by llama.cpp's names, those of an answer if one is given."""
    limit = -1 if generation is None else generation.max_tokens
    return {
        "n_predict": limit,
        "max_tokens": limit,
        "seed": RANDOM_SEEDS[1] if sampling.seed is None else sampling.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": [] if generation is None else list(generation.text.stop),
        "n_probs": 0,
        "ignore_eos": False,
    }


class AppliedTemplate(ResponseModel):
    prompt: str


class Properties(ResponseModel):
    default_generation_settings: dict[str, Any]
    total_slots: int
    model_path: str
    """Name of the model. Paths are not told."""
    chat_template: str
    bos_token: str
    eos_token: str
    modalities: dict[str, bool]
    build_info: str
    is_sleeping: bool = False


class LlamaServerEndpoints:
    """The routes of llama-server's own API that no other one has."""

    def __init__(self, endpoints: Endpoints, pool: ModelPool) -> None:
        self._endpoints, self._pool = endpoints, pool
        self.router = router = APIRouter(include_in_schema=False, route_class=BodyRoute)
        router.post("/completion")(self.complete)
        router.post("/completions")(self.complete)
        router.post("/apply-template")(self.apply_template)
        router.get("/props")(self.properties)

    async def complete(self, request: LlamaCompletion, http: Request) -> Response:
        return await self._endpoints.answer(request.translation, partial(LlamaBuilder, request), http)

    async def apply_template(self, request: ChatRequest, http: Request) -> Response:
        def compute(engine: EngineScheduler) -> AppliedTemplate:
            return AppliedTemplate(prompt=prompt_of(engine, request).text)

        return await self._endpoints.until_disconnect(http, self._endpoints.with_engine(request.model, compute))

    async def properties(self, http: Request, model: str = "") -> Response:
        def compute(engine: EngineScheduler) -> Properties:
            sampling = self._endpoints.sampling.fill(SamplingOptions(temperature=None))
            settings = _settings(sampling.with_defaults(engine.sampling_defaults))
            return Properties(
                default_generation_settings={"n_ctx": engine.context_length, "params": settings},
                total_slots=engine.num_sequences,
                model_path=model or next(iter(self._pool.artefacts)),
                chat_template=engine.chat_template or "",
                bos_token=engine.bos_token,
                eos_token=engine.eos_token,
                modalities={"vision": False, "audio": False},
                build_info=f"efficientllm {version('efficientllm')}",
            )

        return await self._endpoints.until_disconnect(http, self._endpoints.with_engine(model, compute))
