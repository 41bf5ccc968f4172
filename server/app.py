"""The FastAPI application: OpenAI's endpoints, health, metrics and the chat page."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ..runtime.base.errors import ContextOverflowError, EfficientLLMError, UsageError
from ..runtime.engines.memory import memory_bytes
from ..runtime.engines.owned import OwnedEngine
from ..runtime.generation import AnswerOptions, Generation, Overflow, chat_prompt, text_prompt
from ..runtime.json_constraint import JsonTokens
from ..runtime.sampling import SamplingOptions
from .answers import Answer, ChatAnswer, TextAnswer
from .guard import Guard
from .metrics import AnswerClock, Metrics
from .openapi import (
    ERRORS,
    ChatCompletion,
    Health,
    ModelCard,
    ModelList,
    TextCompletion,
    answer_or_events,
    document,
)
from .pool import ModelPool
from .schemas import APIError, ChatRequest, CompletionRequest, TextRequest

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
"""The page is one file: nothing is fetched from anywhere else."""


CLIENT_GONE = 499
"""nginx's status for it: nobody reads the answer, but metrics count it."""


@dataclass(frozen=True)
class AppOptions:
    """access"""

    api_key: str = ""
    """Key that clients must send; empty: that of --api-key-file, or else of EFFICIENTLLM_API_KEY, if any."""
    api_key_file: str = ""
    """File that holds the key: a flag can be read in the list of processes."""
    allow_host: tuple[str, ...] = ()
    """Further name that browsers may call a server of this machine alone by, repeatable; matters without a key."""
    cors_origin: tuple[str, ...] = ()
    """Web page's origin that may call the endpoint from a browser, repeatable; none by default."""
    max_body_bytes: int = 1_000_000
    """Largest request."""
    overflow: Overflow = "error"
    """Where a chat outgrows the context window: error, or slide (forget the oldest tokens)."""

    @property
    def key(self) -> str:
        """The key, wherever it is given; UsageError for a file without one."""
        if self.api_key or not self.api_key_file:
            return self.api_key or os.environ.get("EFFICIENTLLM_API_KEY", "")
        key = Path(self.api_key_file).read_text(encoding="utf-8").strip()
        if not key:
            raise UsageError(f"--api-key-file {self.api_key_file}: is empty")
        return key


def create_app(pool: ModelPool, options: AppOptions | None = None, hosts: Sequence[str] = ()) -> FastAPI:
    """An application that serves `pool`; it closes the pool when it shuts down.

    `hosts`: names that it is called by, where only this machine may; without a key, other names are refused.
    """
    options = options or AppOptions()
    metrics = Metrics(pool)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(pool.close)

    app = FastAPI(title="efficientllm", lifespan=lifespan)
    names = frozenset([*hosts, *options.allow_host] if hosts and not options.key else [])
    app.add_middleware(Guard, api_key=options.key, max_body_bytes=options.max_body_bytes, hosts=names)
    if options.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors_origin), allow_methods=["*"], allow_headers=["*"]
        )
    _add_error_handlers(app, metrics)
    app.include_router(Endpoints(pool, metrics, options.overflow).router)
    document(app, pool.artefacts)
    return app


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Answer every refusal in OpenAI's shape and count it."""

    def refuse(request: Request, error: APIError) -> JSONResponse:
        route = request.scope.get("route")  # its pattern: what clients make up must not become labels
        metrics.requests.labels(route.path if route else "other", str(error.status)).inc()
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(APIError)
    async def answer_api_error(request: Request, error: APIError) -> JSONResponse:
        return refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def answer_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        # between the fields pydantic names its types, as in messages.0.content.list[TextPart].0.type
        parts = [str(part) for part in first["loc"] if part != "body" and re.fullmatch(r"\w+", str(part))]
        return refuse(
            request, APIError(400, f"{'.'.join(parts)}: {first['msg'].removeprefix('Value error, ')}".lstrip(": "))
        )

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
        body = APIError(error.status_code, str(error.detail)).body
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def answer_failure(request: Request, error: Exception) -> JSONResponse:
        return refuse(request, APIError(500, f"the server failed: {type(error).__name__}", "server_error"))


class Endpoints:
    """The routes; what they send is written here and in `answers`, so FastAPI is given no response_model to apply."""

    def __init__(self, pool: ModelPool, metrics: Metrics, overflow: Overflow) -> None:
        self._pool, self._metrics = pool, metrics
        self._overflow: Overflow = overflow
        self.router = router = APIRouter()
        router.get("/", response_class=HTMLResponse, include_in_schema=False)(self.page)
        router.get("/health", response_model=None, responses={200: {"model": Health}})(self.health)
        router.get("/metrics", response_class=Response)(self.prometheus)
        router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}})(self.models)
        one_model = {200: {"model": ModelCard}, **ERRORS}
        router.get("/v1/models/{name:path}", response_model=None, responses=one_model)(self.model)
        for path, endpoint, answer in (
            ("/v1/chat/completions", self.chat_completions, ChatCompletion),
            ("/v1/completions", self.completions, TextCompletion),
        ):
            router.post(path, response_model=None, responses=answer_or_events(answer))(endpoint)

    async def page(self) -> HTMLResponse:
        text = resources.files("efficientllm.server").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})

    async def health(self) -> dict[str, Any]:
        workers = self._pool.loaded.items()
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

    async def chat_completions(self, request: ChatRequest, http: Request) -> Response:
        return await self._unless_gone(http, self._answer(request, ChatAnswer, "/v1/chat/completions"))

    async def completions(self, request: TextRequest, http: Request) -> Response:
        return await self._unless_gone(http, self._answer(request, TextAnswer, "/v1/completions"))

    async def _unless_gone(self, http: Request, answer: Coroutine[Any, Any, Response]) -> Response:
        """The answer, whose work is stopped where the client goes away before it is there."""
        work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnection(http))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            self._metrics.requests.labels(http.scope["route"].path, str(CLIENT_GONE)).inc()
            return Response(status_code=CLIENT_GONE)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})

    async def _answer(self, request: CompletionRequest, answer_class: type[Answer], path: str) -> Response:
        clock = AnswerClock(self._metrics, request.model)
        worker = await self._pool.enter(request.model)
        try:
            # tokenizing a long prompt takes a while too
            generations = await asyncio.to_thread(_generations, worker.engine, request, self._overflow)
        except BaseException:
            worker.leave()
            raise
        answered = answer_class(request, generations, clock)
        pieces = answered.pieces(worker.stream(generations))
        if request.stream:
            # the first piece is awaited here, so that a full queue is answered with its own status
            first = await anext(pieces, None)
            self._metrics.requests.labels(path, "200").inc()
            return _EventStream(answered.events(first, pieces), pieces)
        body = await answered.whole(pieces)
        self._metrics.requests.labels(path, "200").inc()
        return JSONResponse(body)


async def _disconnection(http: Request) -> None:
    """Return when the client is gone; the body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _generations(engine: OwnedEngine, request: CompletionRequest, overflow: Overflow) -> list[Generation]:
    """One generation per choice; APIError 400 where the engine refuses the prompt."""
    sampling = SamplingOptions(
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        seed=request.seed,
    )
    options = AnswerOptions(request.token_limit, sampling, request.stops, request.top_count, overflow)
    # every choice of a seeded request draws its own numbers
    seeds = [None if request.seed is None else (request.seed + index) % 2**63 for index in range(request.n)]
    choices = [replace(options, sampling=replace(sampling, seed=seed)) for seed in seeds]
    try:
        return [
            Generation(engine, prompt, choice, JsonTokens(engine.token_bytes) if _wants_json(request) else None)
            for prompt in _prompts(engine, request)
            for choice in choices
        ]
    except ContextOverflowError as error:
        raise APIError(400, str(error), code="context_length_exceeded") from error
    except EfficientLLMError as error:
        raise APIError(400, str(error)) from error


def _wants_json(request: CompletionRequest) -> bool:
    return isinstance(request, ChatRequest) and request.response_format.type == "json_object"


def _prompts(engine: OwnedEngine, request: CompletionRequest) -> list[list[int]]:
    if isinstance(request, ChatRequest):
        return [chat_prompt(engine, [message.flat() for message in request.messages])]
    assert isinstance(request, TextRequest)
    prompts = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            tokens = text_prompt(engine, prompt)
            if not tokens:
                raise APIError(400, "prompt: is empty")
            prompts.append(tokens)
        else:
            if max(prompt) >= engine.vocab_size:
                raise APIError(400, f"prompt: token {max(prompt)} is outside the vocabulary of {engine.vocab_size}")
            prompts.append(prompt)
    return prompts


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
