"""The FastAPI application: /v1/chat/completions, /v1/models, /health."""

from __future__ import annotations

import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse

from ..runtime.engine import Engine
from ..runtime.errors import ContextOverflowError, EfficientLLMError
from ..runtime.generation import Generation, chat_prompt
from ..runtime.sampling import SamplingOptions
from .schemas import APIError, ChatRequest
from .worker import EngineWorker

MAX_BODY_BYTES = 1_000_000


def create_app(engine: Engine, name: str, api_key: str = "", waiting: int = 8) -> FastAPI:
    """An application that serves `engine` as model `name`; it closes the engine when it shuts down."""
    worker = EngineWorker(engine, waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(title="efficientllm", lifespan=lifespan)

    @app.exception_handler(APIError)
    async def answer_api_error(request: Request, error: APIError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def answer_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(APIError(400, f"{place}: {first['msg']}".lstrip(": ")).body, 400)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Any:
        if request.url.path.startswith("/v1/"):
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if api_key and not hmac.compare_digest(given.encode(), api_key.encode()):
                return JSONResponse(APIError(401, "invalid API key", code="invalid_api_key").body, 401)
            length = request.headers.get("content-length", "0" if request.method == "GET" else "")
            if not length.isdigit() or int(length) > MAX_BODY_BYTES:
                return JSONResponse(APIError(413, f"the body may have at most {MAX_BODY_BYTES} bytes").body, 413)
        return await call_next(request)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "in_flight": worker.in_flight}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "efficientllm"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: ChatRequest) -> JSONResponse | StreamingResponse:
        if request.model != name:
            raise APIError(
                404, f"model {request.model!r} does not exist; this server has {name!r}", code="model_not_found"
            )
        generation = _generation(engine, request)
        answer = _Answer(request, generation)
        pieces = worker.stream(generation)
        if request.stream:
            # the first piece is awaited here, so that a full queue is answered with its own status
            first = await anext(pieces, None)
            return _EventStream(answer.events(first, pieces), pieces)
        text = "".join([piece async for piece in pieces])
        return JSONResponse(answer.whole(text))

    return app


def _generation(engine: Engine, request: ChatRequest) -> Generation:
    sampling = SamplingOptions(temperature=request.temperature, top_p=request.top_p, seed=request.seed)
    messages = [message.model_dump() for message in request.messages]
    try:
        return Generation(engine, chat_prompt(engine, messages), request.token_limit, sampling, request.stops)
    except ContextOverflowError as error:
        raise APIError(400, str(error), code="context_length_exceeded") from error
    except EfficientLLMError as error:
        raise APIError(400, str(error)) from error


class _EventStream(StreamingResponse):
    """Server-sent events that stop the computation as soon as the client is gone."""

    def __init__(self, events: AsyncGenerator[str], pieces: AsyncGenerator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.generators = (events, pieces)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Starlette drops the generators where they stand; closing them frees the engine now, not when they are
            # collected (and `events` may not even have begun).
            for generator in self.generators:
                await generator.aclose()


class _Answer:
    """One completion in OpenAI's JSON, whole or as server-sent events."""

    def __init__(self, request: ChatRequest, generation: Generation) -> None:
        self.request = request
        self.stats = generation.stats
        self.base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}

    def usage(self) -> dict[str, int]:
        prompt, completion = self.stats.prompt_tokens, self.stats.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def whole(self, text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": self.stats.finish_reason, "logprobs": None}
        return {**self.base, "object": "chat.completion", "choices": [choice], "usage": self.usage()}

    async def events(self, first: str | None, pieces: AsyncIterator[str]) -> AsyncGenerator[str]:
        yield self._event({"role": "assistant", "content": ""})
        if first is not None:
            yield self._event({"content": first})
        async for piece in pieces:
            yield self._event({"content": piece})
        yield self._event({}, self.stats.finish_reason)
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            chunk = {**self.base, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()}
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    def _event(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return f"data: {json.dumps({**self.base, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
