"""OpenAI's endpoints, tokens, health, metrics and the chat page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from ..runtime.base.errors import EfficientLLMError
from ..runtime.engines.memory import memory_bytes
from ..runtime.engines.scheduler import EngineScheduler
from ..runtime.generation import Overflow
from ..runtime.prompt import text_prompt
from .access.guard import TRUSTED
from .answers.answer import Answer, ChatAnswer, TextAnswer
from .answers.choices import Choice, SamplingDefaults, choices_of, text_of
from .answers.embeddings import embeddings_of
from .answers.responses import ResponsesAnswer
from .models.metrics import AnswerClock, Metrics
from .models.pool import ModelPool
from .page.files import page_file
from .schemas.completions import ChatRequest, CompletionRequest, DetokenizeRequest, TextRequest, TokenizeRequest
from .schemas.embeddings import EmbeddingsRequest
from .schemas.error import APIError
from .schemas.openapi import (
    ERRORS,
    ChatCompletion,
    Detokenized,
    Embeddings,
    Health,
    ModelCard,
    ModelList,
    ResponseAnswer,
    TextCompletion,
    Tokenized,
    answer_or_events,
)
from .schemas.responses import ResponsesRequest

MakeAnswer = Callable[[Sequence[Choice], AnswerClock], Answer]

CLIENT_GONE = 499
"""nginx's status for it: nobody reads the answer, but metrics count it."""


class Endpoints:
    """The routes; what they send is written here and in `answers`, so FastAPI is given no response_model to apply."""

    def __init__(self, pool: ModelPool, metrics: Metrics, overflow: Overflow, sampling: SamplingDefaults) -> None:
        self._pool, self._metrics, self._sampling = pool, metrics, sampling
        self._overflow: Overflow = overflow
        self.router = router = APIRouter()
        seen = ["GET", "HEAD"]
        router.api_route("/", methods=seen, response_class=HTMLResponse, include_in_schema=False)(self.page)
        router.get("/page/{name}", include_in_schema=False)(page_file)
        router.get("/health", response_model=None, responses={200: {"model": Health}})(self.health)
        router.head("/health", include_in_schema=False)(self.health)
        router.get("/metrics", response_class=Response)(self.prometheus)
        router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}})(self.models)
        one_model = {200: {"model": ModelCard}, **ERRORS}
        router.get("/v1/models/{name:path}", response_model=None, responses=one_model)(self.model)
        for path, endpoint, answer in (
            ("/v1/chat/completions", self.chat_completions, ChatCompletion),
            ("/v1/completions", self.completions, TextCompletion),
            ("/v1/responses", self.responses, ResponseAnswer),
        ):
            router.post(path, response_model=None, responses=answer_or_events(answer))(endpoint)
        for path, endpoint, answer in (
            ("/v1/embeddings", self.embeddings, Embeddings),
            ("/tokenize", self.tokenize, Tokenized),
            ("/detokenize", self.detokenize, Detokenized),
        ):
            router.post(path, response_model=None, responses={200: {"model": answer}, **ERRORS})(endpoint)

    async def page(self) -> Response:
        return page_file("index.html")

    async def health(self, http: Request) -> dict[str, Any]:
        workers = self._pool.loaded.items() if http.scope.get(TRUSTED) else ()
        loaded = {name: {"kv_cache_bytes": worker.engine.kv_cache_bytes} for name, worker in workers}
        return {"status": "ok", "in_flight": self._pool.in_flight, "loaded": loaded, **memory_bytes()}

    async def prometheus(self) -> Response:
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card(name) for name in self._pool.artefacts]}

    async def model(self, name: str) -> dict[str, Any]:
        if name not in self._pool.artefacts:
            raise APIError(404, f"model {name!r} does not exist", code="model_not_found")
        return self._card(name)

    def _card(self, name: str) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": 0, "owned_by": "efficientllm"}
        return {**card, "max_model_len": self._pool.context_length(name)}

    async def embeddings(self, request: EmbeddingsRequest, http: Request) -> Response:
        return await self._unless_gone(http, self._embed(request))

    async def _embed(self, request: EmbeddingsRequest) -> Response:
        """One text after the other, so that it ends with the one that is being read where nobody waits any more."""
        deadline = self._pool.deadline()
        worker = await self._pool.enter(request.model, deadline)
        try:
            async with asyncio.timeout_at(deadline.at), worker.embedding:
                body = await embeddings_of(worker.engine, request)
        except TimeoutError as error:
            raise deadline.error() from error
        finally:
            worker.leave()
        return JSONResponse(body)

    async def tokenize(self, request: TokenizeRequest, http: Request) -> Response:
        def tokens_of(engine: EngineScheduler) -> list[int]:
            if request.add_special and not request.parse_special:
                return text_prompt(engine, request.content) if request.content else []
            begin = engine.bos_token if request.add_special and engine.adds_bos else ""
            begins = engine.tokenize(begin, special=True) if begin else []
            return begins + engine.tokenize(request.content, special=request.parse_special)

        return await self._with_engine(http, request.model, "tokens", tokens_of)

    async def detokenize(self, request: DetokenizeRequest, http: Request) -> Response:
        def content_of(engine: EngineScheduler) -> str:
            if request.tokens and max(request.tokens) >= engine.vocab_size:
                raise APIError(400, f"tokens: {max(request.tokens)} is outside the vocabulary of {engine.vocab_size}")
            return text_of(engine, request.tokens)

        return await self._with_engine(http, request.model, "content", content_of)

    async def _with_engine(
        self, http: Request, model: str, name: str, use: Callable[[EngineScheduler], Any]
    ) -> Response:
        """{`name`: what `use` makes of a model's engine in a thread}; "" is the first model."""

        async def answer() -> Response:
            deadline = self._pool.deadline()
            worker = await self._pool.enter(model or next(iter(self._pool.artefacts)), deadline)
            try:
                made = await worker.prepare(partial(use, worker.engine), deadline)
            except EfficientLLMError as error:
                raise APIError(400, str(error)) from error
            worker.leave()
            return JSONResponse({name: made})

        return await self._unless_gone(http, answer())

    async def chat_completions(self, request: ChatRequest, http: Request) -> Response:
        return await self._answer(http, request, partial(ChatAnswer, request))

    async def completions(self, request: TextRequest, http: Request) -> Response:
        return await self._answer(http, request, partial(TextAnswer, request))

    async def responses(self, request: ResponsesRequest, http: Request) -> Response:
        return await self._answer(http, request.as_chat(), partial(ResponsesAnswer, request))

    async def _answer(self, http: Request, request: CompletionRequest, make: MakeAnswer) -> Response:
        return await self._unless_gone(http, self._answer_now(request, make))

    async def _unless_gone(self, http: Request, answering: Coroutine[Any, Any, Response]) -> Response:
        """The answer, whose work is stopped where the client goes away before it is there."""
        work = asyncio.ensure_future(answering)
        gone = asyncio.ensure_future(_disconnection(http))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            # what it raises is counted where it is told
            response = work.result() if work.done() else Response(status_code=CLIENT_GONE)
            self._metrics.count_request(response.status_code, http.scope["route"].path)
            return response
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})

    async def _answer_now(self, request: CompletionRequest, make: MakeAnswer) -> Response:
        clock, deadline = AnswerClock(self._metrics, request.model), self._pool.deadline()
        worker = await self._pool.enter(request.model, deadline)
        make_choices = partial(choices_of, worker.engine, request, self._overflow, self._sampling)
        choices = await worker.prepare(make_choices, deadline)  # a long prompt or a large grammar takes a while
        answered = make(choices, clock)
        pieces = answered.pieces(worker.stream([choice.generation for choice in choices], deadline))
        if request.stream:
            # the first piece is awaited here, so that a full queue is answered with its own status
            first = await anext(pieces, None)
            return _EventStream(answered.events(first, pieces), pieces)
        return JSONResponse(await answered.whole(pieces))


async def _disconnection(http: Request) -> None:
    """Return when the client is gone; the body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """Server-sent events that stop the computation as soon as the client is gone."""

    def __init__(self, events: AsyncGenerator[str], pieces: AsyncGenerator[Any]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.generators = (events, pieces)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Starlette drops the generators where they stand; closing them frees the engine now, not when they are
            # collected (and `events` may not even have begun).
            for generator in self.generators:
                await generator.aclose()
