"""llama-server's own API: POST /completion and /apply-template, GET /props. Fields are those of llama.cpp's README.

Unlike a prompt of OpenAI's API, that of /completion may have control tokens, because /apply-template writes them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from ..runtime.engines.scheduler import EngineScheduler
from ..runtime.generation import Generation, TokenLogprob
from ..runtime.sampling import SamplingOptions
from .answers.builders import TextBuilder, with_first
from .answers.choices import Choice, prompt_of
from .body import BodyRoute
from .endpoints import Endpoints
from .models.pool import ModelPool
from .models.worker import Piece
from .schemas.api_error import APIError
from .schemas.completions import (
    MAX_TOKENS,
    Bias,
    ChatRequest,
    LlamaSampling,
    Prompt,
    TextRequest,
    Token,
    TranslatedRequest,
)
from .schemas.messages import Bool, Float, Int, Json, Text
from .schemas.response_models import UNLESS_EMPTY, ResponseModel, Timings

RANDOM_SEEDS = (-1, 2**32 - 1)
"""Values of `seed` that ask for random numbers."""


class PlainRequest(TextRequest):
    """A text completion whose prompts may have control tokens."""

    has_control_tokens: ClassVar[bool] = True
    text_bias: dict[Text, Bias] = Field({})
    """{text: bias of its tokens}"""

    def biases(self, tokenize: Callable[[str], list[int]]) -> list[tuple[int, float]]:
        texts = [(token, bias) for text, bias in self.text_bias.items() for token in tokenize(text)]
        return super().biases(tokenize) + texts


class LlamaCompletion(LlamaSampling, TranslatedRequest):
    """POST /completion."""

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
        Annotated[list[tuple[Token | Text, Float | Literal[False]]], Field(max_length=1024, fail_fast=True)]
        | Annotated[dict[Text, Float | Literal[False]], Field(max_length=1024)]
    ) = Field(default=[])
    """Pairs of a token, or a text whose tokens are meant, and its bias."""
    ignore_eos: Bool = False
    n_probs: Annotated[Int, Field(ge=0, le=20)] = 0
    """Number of most likely tokens that `completion_probabilities` has for each token."""
    return_tokens: Bool = False
    timings_per_token: Bool = False
    response_fields: Annotated[list[Text], Field(max_length=100)] = Field(default=[])
    """Fields of the answer that are sent, such as generation_settings/n_predict. Empty: all."""

    def translate(self) -> PlainRequest:
        biases: dict[bool, dict[str, float]] = {True: {}, False: {}}
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias
        for token, bias in pairs:
            is_token = isinstance(token, int) or (isinstance(self.logit_bias, dict) and token.isdigit())
            # -100 forbids a token in OpenAI's API, false in this one, which has no limits of numbers
            biases[is_token][str(token)] = -100 if bias is False else max(-100, min(100, bias))
        values = self.model_dump(include={"model", "prompt", "top_p", "min_p", "stop", "stream", "ignore_eos"})
        values |= self.model_dump(include={"presence_penalty", "frequency_penalty", "repeat_penalty"})
        values |= self.model_dump(include={"grammar", "json_schema", "timings_per_token"})
        values |= {
            "max_tokens": self.n_predict if self.max_tokens is None else self.max_tokens,
            "temperature": None if self.temperature is None else max(0.0, self.temperature),
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "seed": None if self.seed in RANDOM_SEEDS else self.seed,
            "logit_bias": biases[True],
            "text_bias": biases[False],
            "logprobs": self.n_probs or None,
        }
        return PlainRequest.model_validate(values)


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
    has_new_line: bool
    timings: Timings
    completion_probabilities: Annotated[list[dict[str, Any]], UNLESS_EMPTY] = Field([])


class LlamaBuilder(TextBuilder):
    """Builds the answer to a /completion request, whole or as events."""

    def __init__(self, asked: LlamaCompletion, choices: Sequence[Choice], began: float) -> None:
        super().__init__(asked.translation, choices, began)
        self._asked = asked
        self._texts, self._num_sent = [""] * len(choices), [0] * len(choices)
        """Text so far, and tokens that events have carried, by choice."""

    async def whole(self, pieces: AsyncGenerator[Piece]) -> Any:
        """Return the answer in one object, after the last piece, or a list of answers to several prompts."""
        records: list[list[TokenLogprob]] = [[] for _ in self.choices]
        async for piece in pieces:
            self._texts[piece.choice] += piece.text
            records[piece.choice] += piece.logprobs
        answers = []
        for index, text in enumerate(self._texts):
            answers.append(self._selected(self._answer(index, text, records[index])))
        return JSONResponse(answers[0] if len(answers) == 1 else answers)

    async def events(self, first: Piece | None, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[str]:
        """Yield server-sent events of `first` and of the rest of `pieces`."""
        try:
            async for piece in with_first(first, pieces):
                if piece.is_ping:
                    yield self.ping
                    continue
                self._texts[piece.choice] += piece.text
                event = self._piece_event(piece)
                if piece.finish_reason:
                    event = self._selected(self._answer(piece.choice, "", piece.logprobs))
                yield f"data: {json.dumps(event)}\n\n"
        except APIError as error:
            yield f"data: {json.dumps(error.body)}\n\n"

    def _piece_event(self, piece: Piece) -> dict[str, Any]:
        generation, begin = self.choices[piece.choice].generation, self._num_sent[piece.choice]
        self._num_sent[piece.choice] = piece.tokens
        # the answer may have grown meanwhile, but it never shrinks
        said = {"index": piece.choice, "content": piece.text, "tokens": generation.answer[begin : piece.tokens]}
        counts = {"tokens_predicted": piece.tokens, "tokens_evaluated": generation.stats.prompt_tokens}
        timed = {"timings": self.timings(piece.choice).model_dump()} if self._asked.timings_per_token else {}
        return {**said, "stop": False, **counts, **timed, **self._probabilities(piece.logprobs)}

    def _probabilities(self, records: Sequence[TokenLogprob]) -> dict[str, Any]:
        if not self._asked.n_probs:
            return {}
        shown = []
        for record in records:
            top = [{"id": token, **self.token_fields(token, logprob)} for token, logprob in record.top]
            chosen = self.token_fields(record.token, record.logprob)
            shown.append({"id": record.token, **chosen, "top_logprobs": top})
        return {"completion_probabilities": shown}

    def _selected(self, answer: LlamaAnswer) -> dict[str, Any]:
        """Return the fields of an answer that the request asks for."""
        fields = answer.model_dump()
        if not self._asked.response_fields:
            return fields
        selected = {}
        for path in self._asked.response_fields:
            value: Any = fields
            with contextlib.suppress(KeyError, TypeError):  # a field that the answer does not have
                for name in path.split("/"):
                    value = value[name]
                selected[path] = value
        return selected

    def _answer(self, index: int, text: str, records: Sequence[TokenLogprob]) -> LlamaAnswer:
        generation = self.choices[index].generation
        stats = generation.stats
        stop_type = "word" if generation.text.stopped else "limit" if stats.finish_reason == "length" else "eos"
        repeated = self._asked.model_dump(include={"grammar", "n_probs", "ignore_eos"})
        return LlamaAnswer(
            index=index,
            content=text,
            tokens=generation.answer if self._asked.return_tokens else [],
            model=self.base["model"],
            prompt=self.choices[index].prompt,
            generation_settings=_settings(generation.sampler.options, generation) | repeated,
            tokens_predicted=stats.completion_tokens,
            tokens_evaluated=stats.prompt_tokens,
            tokens_cached=stats.cached_tokens,
            truncated=stats.prompt_tokens + stats.completion_tokens > generation.engine.context_length,
            stop_type=stop_type,
            stopping_word=generation.text.found,
            has_new_line="\n" in self._texts[index],
            timings=self.timings(index),
            **self._probabilities(records),
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
        """Continue a prompt of llama-server's API."""
        return await self._endpoints.answer(request.translation, partial(LlamaBuilder, request), http)

    async def apply_template(self, request: ChatRequest, http: Request) -> Response:
        """Return the rendered chat without answering it."""

        def compute(engine: EngineScheduler) -> AppliedTemplate:
            return AppliedTemplate(prompt=prompt_of(engine, request).text)

        self._endpoints.name_model(request)
        return await self._endpoints.until_disconnect(http, self._endpoints.with_engine(request.model, compute))

    async def properties(self, http: Request, model: str = "") -> Response:
        """Return the settings of a model."""

        def compute(engine: EngineScheduler) -> Properties:
            sampling = self._endpoints.sampling.fill(SamplingOptions(temperature=None))
            settings = _settings(sampling.with_defaults(engine.sampling_defaults))
            return Properties(
                default_generation_settings={"n_ctx": engine.context_length, "params": settings},
                total_slots=engine.num_sequences,
                model_path=self._pool.named(model),
                chat_template=engine.chat_template or "",
                bos_token=engine.bos_token,
                eos_token=engine.eos_token,
                modalities={"vision": False, "audio": False},
                build_info=f"efficientllm {version('efficientllm')}",
            )

        return await self._endpoints.until_disconnect(http, self._endpoints.with_engine(model, compute))
