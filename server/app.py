"""The FastAPI application: who may call it, and how refusals are answered."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..runtime.base import flags
from ..runtime.base.errors import UsageError
from ..runtime.generation import Overflow
from .access.guard import LOCAL_HOSTS, Guard
from .answers.choices import SamplingDefaults
from .endpoints import Endpoints
from .models.metrics import Metrics
from .models.pool import ModelPool
from .page.reference import reference_page
from .schemas.error import APIError
from .schemas.invalid import said_of, unread
from .schemas.openapi import document


@dataclass(frozen=True)
class AppOptions:
    """access"""

    api_key: str = ""
    """Key that clients must send; empty: that of --api-key-file, or else of EFFICIENTLLM_API_KEY, if any."""
    api_key_file: str = ""
    """File that holds the key: a flag can be read in the list of processes."""
    allow_host: tuple[str, ...] = ()
    """Name that the server is called by, repeatable; matters without a key. Where other machines may call it and names
    are given, it answers to no others but this machine's own."""
    cors_origin: tuple[str, ...] = ()
    """Web page's origin that may call the endpoint from a browser, repeatable; none by default."""
    max_body_bytes: int = 1_000_000
    """Largest request."""
    body_timeout: float = flags.number(30.0, above=0)
    """Seconds a client has to send a request."""
    overflow: Overflow = "error"
    """Where a chat outgrows the context window: error, or slide (forget the oldest tokens)."""

    def __post_init__(self) -> None:
        flags.check_fields(self)

    @property
    def key(self) -> str:
        """The key, wherever it is given; UsageError for a file without one."""
        if self.api_key or not self.api_key_file:
            return self.api_key or os.environ.get("EFFICIENTLLM_API_KEY", "")
        key = Path(self.api_key_file).read_text(encoding="utf-8").strip()
        if not key:
            raise UsageError(f"--api-key-file {self.api_key_file}: is empty")
        return key


def create_app(
    pool: ModelPool,
    options: AppOptions | None = None,
    is_local: bool = False,
    sampling: SamplingDefaults | None = None,
) -> FastAPI:
    """An application that serves `pool`; it closes the pool when it shuts down.

    `is_local`: only this machine may call it; without a key, other names than its own are refused then.
    """
    options = options or AppOptions()
    metrics = Metrics(pool)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(pool.close)

    app = FastAPI(title="efficientllm", lifespan=lifespan, docs_url=None, redoc_url=None)  # they load from elsewhere
    is_named = (is_local or options.allow_host) and not options.key
    names = frozenset((*LOCAL_HOSTS, *options.allow_host) if is_named else ())
    limits = {"max_body_bytes": options.max_body_bytes, "body_timeout": options.body_timeout}
    app.add_middleware(Guard, api_key=options.key, hosts=names, count=metrics.count_request, **limits)
    if options.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors_origin), allow_methods=["*"], allow_headers=["*"]
        )
    _add_error_handlers(app, metrics)
    app.include_router(Endpoints(pool, metrics, options.overflow, sampling or SamplingDefaults()).router)
    document(app, () if options.key else pool.artefacts)  # anybody may read it
    app.get("/docs", include_in_schema=False)(lambda: reference_page(app.openapi()))
    return app


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Answer every refusal in OpenAI's shape and count it."""

    def refuse(request: Request, error: APIError) -> JSONResponse:
        route = request.scope.get("route")  # its pattern: what clients make up must not become labels
        metrics.count_request(error.status, route.path if route else "other")
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(APIError)
    async def answer_api_error(request: Request, error: APIError) -> JSONResponse:
        return refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def answer_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return refuse(request, APIError(400, said_of(error.errors())))

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400 and error.__cause__ is not None:  # FastAPI could not read the body, and keeps why
            return refuse(request, APIError(400, f"the body is no JSON that can be read: {unread(error.__cause__)}"))
        metrics.count_request(error.status_code)
        body = APIError(error.status_code, str(error.detail)).body
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def answer_failure(request: Request, error: Exception) -> JSONResponse:
        return refuse(request, APIError(500, f"the server failed: {type(error).__name__}", "server_error"))
