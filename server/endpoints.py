"""The routes: OpenAI's endpoints, tokens, health and the chat page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from functools import partial
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from ..runtime.base.errors import EfficientLLMError
from ..runtime.cautious_reader import reply_to_question
from ..runtime.engines.memory import memory_bytes
from ..runtime.engines.scheduler import EngineScheduler
from ..runtime.prompt import text_prompt
from ..runtime.sampling import SamplingDefaults
from .access.guard import TRUSTED
from .answers.builders import ChatBuilder, CompletionBuilder, TextBuilder
from .answers.choices import Choice, make_choices, pieces_of, prompt_of
from .answers.embeddings import embed_texts
from .answers.responses_builder import ResponsesBuilder
from .body import BodyRoute
from .models.pool import ModelPool
from .options import AppOptions
from .schemas.api_error import APIError
from .schemas.completions import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    TextRequest,
    TokenizeRequest,
)
from .schemas.response_models import (
    ChatCompletion,
    Detokenized,
    Embeddings,
    ErrorAnswer,
    Health,
    LoadedModel,
    ModelCard,
    ModelList,
    ResponseAnswer,
    ResponseModel,
    TextCompletion,
    TokenCount,
    Tokenized,
)
from .schemas.responses_api import ResponsesRequest

MakeBuilder = Callable[[Sequence[Choice], float], CompletionBuilder]
Responses = dict[int | str, dict[str, Any]]
"""Possible answers of an endpoint by status, for the OpenAPI document."""

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a request whose client is gone. Nobody reads the answer, but the log shows it."""

ERROR_DESCRIPTIONS = {
    400: "the request is wrong",
    401: "the key is wrong",
    404: "no such model",
    408: "the answer took too long",
    413: "the body is too large",
    415: "the content type is not JSON",
    429: "the queue is full",
    503: "the model does not fit",
}
ERRORS: Responses = {
    status: {"description": description, "model": ErrorAnswer} for status, description in ERROR_DESCRIPTIONS.items()
}


PAGE_FILES = {
    "index.html": "text/html",
    "style.css": "text/css",
    "api.js": "text/javascript",
    "markdown.js": "text/javascript",
    "chats.js": "text/javascript",
    "page.js": "text/javascript",
}
"""Files of the chat page and their types."""

PAGE_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the chat page, which loads nothing from other servers."""


class Endpoints:
    """The routes of one server. POST endpoints send what `answers` builds, and FastAPI does not validate it again."""

    def __init__(self, pool: ModelPool, options: AppOptions, sampling: SamplingDefaults) -> None:
        self._pool, self._options, self.sampling = pool, options, sampling
        self.router = router = APIRouter(route_class=BodyRoute)
        self.short = APIRouter(route_class=BodyRoute, include_in_schema=False)
        """OpenAI's routes without /v1, as llama-server also has them."""
        methods = ["GET", "HEAD"]
        router.api_route("/", methods=methods, response_class=HTMLResponse, include_in_schema=False)(self.page)
        router.get("/page/{name}", include_in_schema=False)(page_file)
        loading = {"description": "the first model is being loaded", "model": Health}
        router.get("/health", responses={503: loading})(self.health)
        router.head("/health", include_in_schema=False)(self.health)
        router.api_route("/v1/health", methods=methods, include_in_schema=False)(self.health)
        self._add_openai("GET", "/models", self.models)
        self._add_openai("GET", "/models/{name:path}", self.model, responses=ERRORS)
        # OpenAPI 3.1 has no schema for single events
        events = {"description": "the answer, whole or as events", "content": {"text/event-stream": {}}}

        def answers(model: type[ResponseModel], **details: Any) -> Responses:
            return {200: {"model": model, **details}, **ERRORS}

        for path, endpoint, responses in (
            ("/chat/completions", self.chat_completions, answers(ChatCompletion, **events)),
            ("/chat/completions/input_tokens", self.count, answers(TokenCount)),
            ("/completions", self.completions, answers(TextCompletion, **events)),
            ("/responses", self.responses, answers(ResponseAnswer, **events)),
            ("/embeddings", self.embeddings, answers(Embeddings)),
        ):
            self._add_openai("POST", path, endpoint, responses=responses)
        router.post("/tokenize", responses=answers(Tokenized))(self.tokenize)
        router.post("/detokenize", responses=answers(Detokenized))(self.detokenize)

    def _add_openai(self, method: str, path: str, endpoint: Any, **details: Any) -> None:
        self.router.api_route(f"/v1{path}", methods=[method], **details)(endpoint)
        self.short.api_route(path, methods=[method])(endpoint)

    async def page(self) -> Response:
        """Return the chat page."""
        return page_file("index.html")

    async def health(self, http: Request, response: Response) -> Health:
        """Return whether the first model is loaded, and to clients with the key what is loaded."""
        if not self._pool.is_ready:
            response.status_code = 503
        workers = self._pool.loaded.items() if http.scope.get(TRUSTED) else ()  # without the key no model is named
        loaded = {name: LoadedModel(kv_cache_bytes=worker.engine.kv_cache_bytes) for name, worker in workers}
        memory: dict[str, Any] = memory_bytes()
        status = "ok" if self._pool.is_ready else "loading"
        return Health(status=status, in_flight=self._pool.in_flight, loaded=loaded, **memory)

    async def models(self) -> ModelList:
        """List the models and their jobs."""
        return ModelList(data=[self._card(name) for name in self._pool.names])

    async def model(self, name: str) -> ModelCard:
        """Return the card of a model or job. APIError 404 for an unknown one."""
        self._pool.require(name)
        return self._card(name)

    def _card(self, name: str) -> ModelCard:
        return ModelCard(id=name, max_model_len=self._pool.context_length(name))

    async def embeddings(self, request: EmbeddingsRequest, http: Request) -> Response:
        """Return an embedding for each text."""
        return await self.until_disconnect(http, self.embed(request))

    async def embed(self, request: EmbeddingsRequest) -> Embeddings:
        """Return the embeddings of the texts of a request."""
        self.name_model(request)
        deadline = self._pool.deadline()
        worker = await self._pool.enter(request.model, deadline)
        try:
            async with asyncio.timeout_at(deadline.at), worker.embedding:
                return await embed_texts(worker.engine, request)
        except TimeoutError as error:
            raise deadline.error() from error
        finally:
            worker.leave()

    async def tokenize(self, request: TokenizeRequest, http: Request) -> Response:
        """Return the tokens of a text, or their pieces."""

        def compute(engine: EngineScheduler) -> Tokenized:
            if request.add_special and not request.parse_special:
                tokens = text_prompt(engine, request.content) if request.content else []
            else:
                tokens = engine.tokenize(request.content, special=request.parse_special)
                if request.add_special and engine.adds_bos and engine.bos_token:
                    tokens = engine.tokenize(engine.bos_token, special=True) + tokens
            return Tokenized(tokens=pieces_of(engine, tokens) if request.with_pieces else tokens)

        return await self.until_disconnect(http, self.with_engine(request.model, compute))

    async def detokenize(self, request: DetokenizeRequest, http: Request) -> Response:
        """Return the text of tokens."""

        def compute(engine: EngineScheduler) -> Detokenized:
            if request.tokens and max(request.tokens) >= engine.vocab_size:
                raise APIError(400, f"tokens: {max(request.tokens)} is outside the vocabulary of {engine.vocab_size}")
            return Detokenized(content=engine.text_of(request.tokens))

        return await self.until_disconnect(http, self.with_engine(request.model, compute))

    async def with_engine(self, model: str, compute: Callable[[EngineScheduler], ResponseModel]) -> ResponseModel:
        """Return the result of `compute` in a thread with the engine of `model`, see `ModelPool.named`."""
        deadline = self._pool.deadline()
        worker = await self._pool.enter(self._pool.named(model), deadline)
        try:
            result = await worker.prepare(partial(compute, worker.engine), deadline)
        except EfficientLLMError as error:
            raise APIError(400, str(error)) from error
        worker.leave()  # an error has freed the place already
        return result

    async def count(self, request: ChatRequest, http: Request) -> Response:
        """Return the number of tokens of a prompt."""

        def compute(engine: EngineScheduler) -> TokenCount:
            return TokenCount(input_tokens=len(prompt_of(engine, request).tokens))

        self.name_model(request)
        return await self.until_disconnect(http, self.with_engine(request.model, compute))

    async def chat_completions(self, request: ChatRequest, http: Request) -> Response:
        """Answer a chat."""
        return await self.answer(request, partial(ChatBuilder, request), http)

    async def completions(self, request: TextRequest, http: Request) -> Response:
        """Continue texts."""
        return await self.answer(request, partial(TextBuilder, request), http)

    async def responses(self, request: ResponsesRequest, http: Request) -> Response:
        """Answer a request of OpenAI's newer API."""
        self.name_model(request)
        return await self.answer(request.translation, partial(ResponsesBuilder, request), http)

    async def answer(self, request: CompletionRequest, make_builder: MakeBuilder, http: Request) -> Response:
        """Return the answer to `request` in the form of a builder."""
        return await self.until_disconnect(http, self._answer(request, make_builder))

    def name_model(self, request: CompletionRequest | EmbeddingsRequest | ResponsesRequest) -> None:
        """Name the model that a request means, see `ModelPool.named`. APIError 400 without a name of several."""
        if not request.model and len(self._pool.artefacts) > 1:
            raise APIError(400, f"model: is missing; this server has {', '.join(self._pool.names)}")
        request.model = self._pool.named(request.model)
        job = self._pool.job_of(request.model)
        if isinstance(request, ChatRequest):
            request.set_job(job)
        elif job and not isinstance(request, ResponsesRequest):
            model = self._pool.model_of(request.model)
            raise APIError(400, f"model: {request.model} is a job of chats, which a text has not; ask for {model}")

    async def _answer(self, request: CompletionRequest, make_builder: MakeBuilder) -> ResponseModel | Response:
        self.name_model(request)
        began, deadline = time.perf_counter(), self._pool.deadline()
        worker = await self._pool.enter(request.model, deadline)
        # in a thread, because a long prompt or a large grammar takes long
        choices = await worker.prepare(partial(self.choices, worker.engine, request), deadline)
        builder = make_builder(choices, began)
        pieces = builder.pieces(worker.stream([choice.generation for choice in choices], deadline))
        if request.stream:
            # the first piece or ping is awaited, so that an error before it is answered with its own status
            first = await anext(pieces, None)
            return _EventStreamResponse(builder.events(first, pieces), pieces, builder.media_type)
        return await builder.whole(pieces)

    def choices(self, engine: EngineScheduler, request: CompletionRequest) -> list[Choice]:
        """Return the answers to a request, with this server's defaults. They are not computed yet."""
        if isinstance(request, ChatRequest) and "tool_arguments" not in request.model_fields_set:
            request.tool_arguments = self._options.tool_arguments
        if not isinstance(request, ChatRequest) or request.tool_use is None:
            return make_choices(engine, request, self._options.overflow, self.sampling)
        key = self._pool.job_of(request.model), request.tool_arguments
        calibration = self._pool.require(request.model).calibrations.get(key)
        # a call that the request demands is no guess of the model
        has_limit = self._options.wrong_acts < 1 and request.tool_choice == "auto"
        if calibration is None and has_limit:
            kind = f"has no calibration for tool_arguments {request.tool_arguments}"
            raise APIError(400, f"model {request.model!r} {kind}, which --wrong-acts needs")
        asked, agreeing = "", 0
        if has_limit:
            asked, agreeing = reply_to_question([each.as_template_value() for each in request.messages])
            # the calibration is that of greedy answers
            changed = {"messages": request.messages[: len(request.messages) - agreeing], "temperature": 0.0}
            request = request.model_copy(update=changed)
        found = make_choices(engine, request, self._options.overflow, self.sampling, calibration is not None)
        if calibration is None:
            return found
        least = calibration.least(self._options.wrong_acts)[0] if has_limit else 0.0
        return [each.with_caution(calibration, least, asked, agreeing > 0) for each in found]

    async def until_disconnect(self, http: Request, work: Coroutine[Any, Any, ResponseModel | Response]) -> Response:
        """Return the response of `work`, and cancel `work` if the client disconnects before it ends."""
        answer = asyncio.ensure_future(work)
        disconnect = asyncio.ensure_future(_wait_for_disconnect(http))
        try:
            await asyncio.wait({answer, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            result = answer.result() if answer.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
            return JSONResponse(result.model_dump()) if isinstance(result, ResponseModel) else result
        finally:
            # awaited after the cancellation, so that the work has freed its place when this request ends
            for task in (answer, disconnect):
                task.cancel()
            await asyncio.wait({answer, disconnect})


def page_file(name: str) -> Response:
    """Return a file of the chat page. APIError 404 for any other name."""
    if name not in PAGE_FILES:
        raise APIError(404, f"the page has no file {name!r}")
    content = resources.files("efficientllm.server.page").joinpath("assets", name).read_bytes()
    headers = {
        "Content-Security-Policy": PAGE_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",  # a page of the last release would call the API of this one
    }
    return Response(content, media_type=f"{PAGE_FILES[name]}; charset=utf-8", headers=headers)


async def _wait_for_disconnect(http: Request) -> None:
    """Return when the client is gone. The body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


class _EventStreamResponse(StreamingResponse):
    """A stream of events. The computation stops as soon as the client is gone."""

    def __init__(self, events: AsyncGenerator[str], pieces: AsyncGenerator[Any], media_type: str) -> None:
        super().__init__(events, media_type=media_type, headers={"Cache-Control": "no-store"})
        self._generators = (events, pieces)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Starlette does not close the generators. Closing them frees the engine now instead of when they are
            # collected. `pieces` is closed as well, because `events` may not have started.
            for generator in self._generators:
                await generator.aclose()
