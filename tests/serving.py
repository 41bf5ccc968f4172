"""A real server on a free port of this machine, for the tests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.access.connections import KEEP_ALIVE_SECONDS
from efficientllm.server.app import create_app
from efficientllm.server.models.pool import ModelPool
from efficientllm.server.models.pool_options import PoolOptions
from efficientllm.server.options import AppOptions


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def loaded_pool(artefacts: Mapping[str, str], options: EngineOptions, limits: PoolOptions | None = None) -> ModelPool:
    """Return a pool whose first model is loaded."""
    pool = ModelPool(artefacts, options, limits)
    with ThreadPoolExecutor(1) as executor:  # Playwright's event loop may run in this thread
        executor.submit(asyncio.run, pool.load_first()).result()
    return pool


@contextlib.contextmanager
def serve(pool: ModelPool, options: AppOptions, **config: Any) -> Iterator[str]:
    """Serve `pool`; yields the address and checks that the server ends. `config` is uvicorn's."""
    port = free_port()
    app = create_app(pool, options)
    config = {"host": "127.0.0.1", "port": port, "log_config": None, "log_level": "error", "ws": "none", **config}
    server = uvicorn.Server(uvicorn.Config(app, timeout_keep_alive=KEEP_ALIVE_SECONDS, **config))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:  # a server that goes on would keep a failed run from ending
        server.should_exit = True
        thread.join(timeout=20)
    assert not thread.is_alive()


@contextlib.contextmanager
def served(
    artefact: Path, app: AppOptions | None = None, limits: PoolOptions | None = None, **engine: Any
) -> Iterator[str]:
    """Serve an artefact as the model "tiny" with one thread and `engine` options; yields the address."""
    pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, **engine), limits)
    with serve(pool, app or AppOptions()) as address:
        yield address


def openai_client(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def http_client(address: str) -> httpx.Client:
    return httpx.Client(base_url=address, timeout=60)


def post(address: str, path: str = "chat/completions", **body: Any) -> httpx.Response:
    """Ask the model "tiny", by OpenAI's API."""
    return httpx.post(f"{address}/v1/{path}", json={"model": "tiny", **body}, timeout=60)
