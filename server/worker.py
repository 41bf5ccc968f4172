"""One engine behind a bounded queue: answers are computed one at a time in a thread, never on the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..runtime.engines.engine import Engine
from ..runtime.generation import Generation, TokenLogprob
from .schemas import APIError


@dataclass(frozen=True)
class Piece:
    """A part of the answer."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    tokens: int
    """Tokens of this choice so far."""
    finish_reason: str | None = None
    """Set on the last piece of a choice, which has no text."""


class EngineWorker:
    """Owns an engine. `waiting` requests may stand in line behind the one that is being answered."""

    def __init__(self, engine: Engine, waiting: int, timeout: float) -> None:
        """`timeout`: seconds a request may take, the wait in the queue included."""
        self.engine = engine
        self.capacity = waiting + 1
        self.timeout = timeout
        self.in_flight = 0
        self.last_used = time.monotonic()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def stream(self, generations: Sequence[Generation]) -> AsyncGenerator[Piece]:
        """Pieces of every generation, one after the other; leaving the iteration stops the work within a token.

        Raises APIError 429 where the queue is full, 408 where the time is over.
        """
        if self.in_flight >= self.capacity:
            raise APIError(429, "the server is busy; try again later", "rate_limit_error", "rate_limit_exceeded")
        self.in_flight += 1
        self.last_used = time.monotonic()
        deadline = self.last_used + self.timeout
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | BaseException | None]()
        abandoned = threading.Event()

        def send(item: Piece | BaseException | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, item)

        def compute() -> None:
            end: BaseException | None = None
            try:
                for choice, generation in enumerate(generations):
                    for text in () if abandoned.is_set() else generation:
                        if abandoned.is_set():
                            break
                        stats = generation.stats
                        send(Piece(choice, text, tuple(generation.take_logprobs()), stats.completion_tokens))
                    stats, rest = generation.stats, tuple(generation.take_logprobs())
                    send(Piece(choice, "", rest, stats.completion_tokens, stats.finish_reason or "length"))
            except BaseException as error:
                end = error
            send(end)

        done = loop.run_in_executor(self._thread, compute)
        done.add_done_callback(self._free_place)  # also where this coroutine is cancelled while it waits
        try:
            while True:
                try:
                    piece = await asyncio.wait_for(pieces.get(), deadline - time.monotonic())
                except TimeoutError as error:
                    message = f"the answer took longer than {self.timeout:g} s"
                    raise APIError(408, message, "timeout_error", "timeout") from error
                if not isinstance(piece, Piece):
                    break
                yield piece
            if piece is not None:
                raise piece
            await done
        finally:
            abandoned.set()

    def _free_place(self, done: asyncio.Future[None]) -> None:
        self.in_flight -= 1
        self.last_used = time.monotonic()

    def close(self) -> None:
        """Wait for the answer in progress, then free the engine."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.engine.close()
