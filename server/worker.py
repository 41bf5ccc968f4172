"""One engine behind a bounded queue: answers are computed one at a time in a thread, never on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..runtime.base.errors import EfficientLLMError
from ..runtime.engines.owned import OwnedEngine
from ..runtime.generation import Generation, TokenLogprob
from .schemas import APIError


@dataclass(frozen=True)
class Piece:
    """A part of the answer."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    token_bytes: Mapping[int, bytes]
    """Of every token in `logprobs`: the engine may be unloaded while a slow client still reads."""
    tokens: int
    """Tokens of this choice so far."""
    finish_reason: str | None = None
    """Set on the last piece of a choice, which has no text."""


class EngineWorker:
    """Owns an engine. `waiting` requests may stand in line behind the one that is being answered."""

    def __init__(self, engine: OwnedEngine, waiting: int, timeout: float, when_idle: Callable[[], None]) -> None:
        """`timeout`: seconds a request may take, the wait in the queue included. `when_idle` is called when it is."""
        self.engine = engine
        self.capacity = waiting + 1
        self.timeout = timeout
        self.in_flight = 0
        """Requests that have a place: waiting, or being computed."""
        self.last_used = time.monotonic()
        self._when_idle = when_idle
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    def enter(self) -> None:
        """Take a place, which `leave` or the end of `stream`'s computation frees; APIError 429 where there is none."""
        if self.in_flight >= self.capacity:
            raise APIError(429, "the server is busy; try again later", "rate_limit_error", "rate_limit_exceeded")
        self.in_flight += 1
        self.last_used = time.monotonic()

    def leave(self) -> None:
        """Free a place."""
        self.in_flight -= 1
        self.last_used = time.monotonic()
        if not self.in_flight:
            self._when_idle()

    def stream(self, generations: Sequence[Generation]) -> AsyncGenerator[Piece]:
        """Pieces of every generation, one after the other, computed from now on in a place that was taken.

        Leaving the iteration stops the work within a token, or within 512 of a long prompt. Raises APIError 408 where
        the time is over.
        """
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | BaseException | None]()

        def send(item: Piece | BaseException | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, item)

        done = loop.run_in_executor(self._thread, _compute, generations, send)
        done.add_done_callback(lambda _: self.leave())  # also where nobody waits for it any more
        return self._read(generations, pieces, done)

    async def _read(
        self,
        generations: Sequence[Generation],
        pieces: asyncio.Queue[Piece | BaseException | None],
        done: asyncio.Future[None],
    ) -> AsyncGenerator[Piece]:
        deadline = time.monotonic() + self.timeout
        try:
            while True:
                try:
                    piece = await asyncio.wait_for(pieces.get(), deadline - time.monotonic())
                except TimeoutError as error:
                    message = f"the answer took longer than {self.timeout:g} s"
                    raise APIError(408, message, "timeout_error", "timeout") from error
                if isinstance(piece, EfficientLLMError):
                    raise APIError(500, str(piece), "server_error") from piece
                if isinstance(piece, BaseException):
                    raise piece
                if piece is None:
                    await done  # the place is free when the answer is whole
                    return
                yield piece
        finally:
            for generation in generations:
                generation.is_cancelled = True

    def close(self) -> None:
        """Wait for the answer in progress, then free the engine."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.engine.close()


def _compute(generations: Sequence[Generation], send: Callable[[Piece | BaseException | None], None]) -> None:
    """Send every piece of every generation, then None or what went wrong."""
    end: BaseException | None = None
    try:
        for choice, generation in enumerate(generations):
            for text in () if generation.is_cancelled else generation:
                send(_piece(choice, text, generation))
            send(_piece(choice, "", generation, generation.stats.finish_reason or "length"))
    except BaseException as error:
        end = error
    send(end)


def _piece(choice: int, text: str, generation: Generation, finish_reason: str | None = None) -> Piece:
    records = tuple(generation.take_logprobs())
    tokens = {token for record in records for token in (record.token, *(other for other, _ in record.top))}
    token_bytes = {token: generation.engine.token_bytes(token) for token in tokens}
    return Piece(choice, text, records, token_bytes, generation.stats.completion_tokens, finish_reason)
