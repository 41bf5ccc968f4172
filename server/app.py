"""The FastAPI application: access options, error handlers and the OpenAPI document."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..runtime.base.progress import PROGRESS_LOGGER
from ..runtime.sampling import SamplingDefaults
from .access.guard import LOCAL_HOSTS, Guard
from .access.log import AccessLog, escaped
from .endpoints import Endpoints
from .llama_server import LlamaServerEndpoints
from .models.pool import ModelPool
from .ollama import OllamaEndpoints
from .options import AppOptions
from .schemas.api_error import APIError


def create_app(
    pool: ModelPool, options: AppOptions | None = None, is_local: bool = False, sampling: SamplingDefaults | None = None
) -> FastAPI:
    """Return an application that serves `pool` and closes it at shutdown.

    `is_local`: only this machine can reach the server. Without a key, other host names are refused then.
    """
    options = options or AppOptions()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(pool.close)  # it waits for the answers in progress, which need this loop

    # without FastAPI's pages of the document, which load scripts from a CDN
    app = FastAPI(
        title="efficientllm", version=version("efficientllm"), lifespan=lifespan, docs_url=None, redoc_url=None
    )
    is_named = (is_local or options.allow_host) and not options.keys
    names = frozenset((*LOCAL_HOSTS, *options.allow_host) if is_named else ())
    limits = {"max_body_bytes": options.max_body_bytes, "body_timeout": options.body_timeout}
    # the last one added is the outermost: the log and the headers of CORS cover refusals of the guard, too
    app.add_middleware(Guard, api_keys=options.keys, hosts=names, refuse=refuse, **limits)
    if options.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors_origin), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(AccessLog, prints=options.access_log)
    _add_error_handlers(app)
    endpoints = Endpoints(pool, options, sampling or SamplingDefaults())
    app.include_router(endpoints.router)
    app.include_router(OllamaEndpoints(endpoints, pool).router)
    app.include_router(LlamaServerEndpoints(endpoints, pool).router)
    app.include_router(endpoints.short)  # last: /completions is llama-server's own
    _complete_document(app, () if options.keys else pool.names)  # the document needs no key
    return app


def _complete_document(app: FastAPI, models: Iterable[str]) -> None:
    """Add the names of the served models to the OpenAPI document and remove the answer 422, which is never sent."""
    derive, names = app.openapi, list(models)

    def openapi() -> dict[str, Any]:
        document = derive()
        for request in ("ChatRequest", "TextRequest", "ResponsesRequest", "EmbeddingsRequest") if names else ():
            schema = document["components"]["schemas"][request]
            schema["properties"]["model"] = {"type": "string", "enum": names}
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def refuse(scope: Any, error: APIError) -> JSONResponse:
    """Return the answer to a request that fails, in the shape of the API that its path belongs to."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status == 408:
        headers["X-Should-Retry"] = "false"  # OpenAI's clients would have the same answer computed twice more
    is_ollama = f"{scope['path']}/".startswith(f"{OllamaEndpoints.prefix}/")
    body = OllamaEndpoints.error_body(error) if is_ollama else error.body
    return JSONResponse(body, error.status, headers)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def answer_api_error(request: Request, error: APIError) -> JSONResponse:
        path, reason = escaped(request.url.path), escaped(str(error))  # clients such as Home Assistant show no reason
        logging.getLogger(PROGRESS_LOGGER).warning("%s %s %d: %s", request.method, path, error.status, reason)
        return refuse(request.scope, error)

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
        response = refuse(request.scope, APIError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def answer_failure(request: Request, error: Exception) -> JSONResponse:
        return refuse(request.scope, APIError(500, f"the server failed: {type(error).__name__}", "server_error"))
