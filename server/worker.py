"""One engine behind a bounded queue: answers are computed one at a time in a thread, never on the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

from ..runtime.engine import Engine
from ..runtime.generation import Generation
from .schemas import APIError


class EngineWorker:
    """Owns an engine. `waiting` answers may stand in line behind the one that is being computed."""

    def __init__(self, engine: Engine, waiting: int) -> None:
        self.engine = engine
        self.capacity = waiting + 1
        self.in_flight = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def stream(self, generation: Generation) -> AsyncGenerator[str]:
        """Pieces of the answer; leaving the iteration stops the computation within a token.

        Raises APIError 429 where the queue is full.
        """
        if self.in_flight >= self.capacity:
            raise APIError(429, "the server is busy; try again later", "rate_limit_error", "rate_limit_exceeded")
        self.in_flight += 1
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | BaseException | None]()
        abandoned = threading.Event()

        def compute() -> None:
            end: BaseException | None = None
            try:
                for piece in () if abandoned.is_set() else generation:
                    if abandoned.is_set():
                        break
                    loop.call_soon_threadsafe(pieces.put_nowait, piece)
            except BaseException as error:
                end = error
            loop.call_soon_threadsafe(pieces.put_nowait, end)

        done = loop.run_in_executor(self._thread, compute)
        done.add_done_callback(self._free_place)  # also where this coroutine is cancelled while it waits
        try:
            while isinstance(piece := await pieces.get(), str):
                yield piece
            if piece is not None:
                raise piece
            await done
        finally:
            abandoned.set()

    def _free_place(self, done: asyncio.Future[None]) -> None:
        self.in_flight -= 1

    def close(self) -> None:
        """Wait for the answer in progress, then free the engine."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.engine.close()
