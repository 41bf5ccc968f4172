"""Connect the answers of an engine to the event loop, with a bounded queue of requests.

A request takes a place (`enter`), prepares its answers in a thread (`prepare`), and reads their text (`stream`). The
place is free again after `leave`, a failed `prepare`, or the end of the computation.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from ...runtime.base.errors import EfficientLLMError, UnanswerableError
from ...runtime.engines.batch import Answer, AnswerProgress
from ...runtime.engines.scheduler import EngineScheduler
from ...runtime.generation import Generation, TokenLogprob
from ..schemas.api_error import APIError, busy_error, shutdown_error


@dataclass(frozen=True)
class Deadline:
    """End of the time of a request: loading, waiting and answering together."""

    seconds: float
    """Seconds from the arrival of the request."""
    at: float
    """Time of the event loop's clock."""

    @classmethod
    def from_now(cls, seconds: float) -> Deadline:
        """Return the deadline of a request that arrives now."""
        return cls(seconds, asyncio.get_running_loop().time() + seconds)

    def error(self) -> APIError:
        """Return the error for the client."""
        return APIError(408, f"the answer took longer than {self.seconds:g} s", "timeout_error", "timeout")


T = TypeVar("T")


def run_in_thread(compute: Callable[[], T]) -> asyncio.Future[T]:
    """Return the future of compute(), run in a daemon thread."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        try:
            result = compute()
        except StopIteration as error:  # a future cannot hold this exception
            settle(future.set_exception, RuntimeError(f"{error!r} was not caught"))
        except BaseException as error:
            settle(future.set_exception, error)
        else:
            settle(future.set_result, result)

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        def settle_in_loop() -> None:
            if not future.done():  # a cancelled future raises if it is set
                set_outcome(outcome)

        with contextlib.suppress(RuntimeError):  # the loop is closed, so nothing waits for the future
            loop.call_soon_threadsafe(settle_in_loop)

    # not by asyncio.to_thread: asyncio and the interpreter join the threads of its executor before they end
    threading.Thread(target=work, daemon=True).start()
    return future


@dataclass(frozen=True)
class Piece:
    """Some text of one choice of the answer."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    token_bytes: Mapping[int, bytes]
    """UTF-8 bytes of every token in `logprobs`. The engine may be unloaded before a slow client reads them."""
    tokens: int
    """Tokens of this choice so far."""
    finish_reason: str | None = None
    """Set in the last piece of a choice, which has no text."""

    @property
    def is_ping(self) -> bool:
        """Return True if the piece only tells that the answer is still being computed."""
        return self is PING


PING = Piece(0, "", (), {}, 0)

HEAD_SECONDS = 1.0
"""Time from a request to the first ping. Errors before it are answered with their own status."""

PING_SECONDS = 10.0
"""Time between pings. Proxies close connections that are silent for a minute."""

Item = Piece | BaseException | None
"""A piece, an error, or None for the end of the answer."""


class _Request:
    """A request whose answers are computed, and the queue of their pieces."""

    def __init__(self, num_answers: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.unfinished = num_answers
        self.has_place = True
        self.pieces: asyncio.Queue[Item] = asyncio.Queue()


class EngineWorker:
    """Owns an engine, with a place for as many requests as it has sequences and for `waiting` more.

    All methods are called on one event loop.
    """

    def __init__(
        self,
        engine: EngineScheduler,
        waiting: int,
        on_idle: Callable[[], None],
        before_close: Callable[[], None] = lambda: None,
    ) -> None:
        """Take over `engine`. Call `on_idle` when the last place becomes free, and `before_close` after all answers."""
        self.engine = engine
        self.capacity = waiting + engine.num_sequences
        self.embedding = asyncio.Lock()
        """Held by the request whose texts are being embedded, because each text has its own evaluation."""
        self.in_flight = 0
        """Requests with a place, waiting or being computed."""
        self.last_used = time.monotonic()
        self._on_idle, self._before_close = on_idle, before_close
        self._streamed = set[_Request]()
        """Requests that a caller reads from."""
        self._prepared = set[asyncio.Future[Any]]()
        """Futures that callers of `prepare` wait for."""
        self._is_aborted = False
        engine.answers.prepare_for_later(lambda: not self.in_flight)  # no grammar is compiled and no text embedded

    def enter(self) -> None:
        """Take a place, until `leave` or the end of `stream`'s computation. Raise APIError 429 if none is free."""
        if self.in_flight >= self.capacity:
            raise busy_error()
        self.in_flight += 1
        self.last_used = time.monotonic()

    def leave(self) -> None:
        """Free a place."""
        self.in_flight -= 1
        self.last_used = time.monotonic()
        if not self.in_flight:
            self._on_idle()

    async def prepare(self, compute: Callable[[], T], deadline: Deadline) -> T:
        """Return compute(), run in a thread, for a request with a place.

        Raise APIError 408 at `deadline`. An error frees the place after the thread has ended.
        """
        if self._is_aborted:
            self.leave()
            raise shutdown_error()
        # shielded: a cancelled caller must not cancel `working`, whose end tells when the thread is done
        working = run_in_thread(compute)
        awaited = asyncio.shield(working)
        self._prepared.add(awaited)
        try:
            async with asyncio.timeout_at(deadline.at):
                return await awaited
        except BaseException as error:
            # not now: compiling a grammar takes seconds, cannot be stopped, and holds a core until then
            working.add_done_callback(self._leave_after)
            if isinstance(error, TimeoutError):
                raise deadline.error() from error
            raise
        finally:
            self._prepared.discard(awaited)

    def _leave_after(self, done: asyncio.Future[Any]) -> None:
        done.exception()  # retrieved, otherwise asyncio logs an error
        self.leave()

    def stream(self, generations: Sequence[Generation], deadline: Deadline) -> AsyncGenerator[Piece]:
        """Start computing the generations of a request with a place, and return an iterator over their pieces.

        Closing the iterator stops the computation within a token, even in a long prompt. The iterator yields pings
        while there is no text, and raises APIError 408 at `deadline`.
        """
        request = _Request(len(generations))
        self._streamed.add(request)
        if self._is_aborted:
            request.pieces.put_nowait(shutdown_error())
        for choice, generation in enumerate(generations):
            receive = partial(self._receive, request, choice, generation)
            self.engine.answers.add(Answer(generation, receive, request))
        return self._read(request, generations, deadline)

    async def _read(
        self, request: _Request, generations: Sequence[Generation], deadline: Deadline
    ) -> AsyncGenerator[Piece]:
        clock, seconds = asyncio.get_running_loop().time, HEAD_SECONDS
        try:
            while True:
                until = min(deadline.at, clock() + seconds)
                try:
                    async with asyncio.timeout_at(until):  # wait_for in Python 3.11 may lose a cancellation
                        item = await request.pieces.get()
                except TimeoutError as error:
                    if until == deadline.at:
                        raise deadline.error() from error
                    item, seconds = PING, PING_SECONDS
                if item is None:
                    return
                if isinstance(item, APIError):
                    raise item
                if isinstance(item, BaseException):
                    raise _api_error(item) from item
                yield item
        finally:
            self._streamed.discard(request)
            is_computed = [generation.cancel() for generation in generations]
            if not any(is_computed):  # otherwise the end of the pass frees the place
                self._free_place(request)

    def _receive(self, request: _Request, choice: int, generation: Generation, progress: AnswerProgress) -> None:
        """Send the result of a pass to the reader. This is called in the thread of the engine."""
        items: list[Item] = []
        try:
            if progress.text:
                items.append(_piece(choice, progress.text, generation))
            if progress.is_over:
                items.append(progress.error or _piece(choice, "", generation, generation.stats.finish_reason))
        except EfficientLLMError as error:  # the engine was closed
            items.append(error)
        if progress.is_over:
            request.unfinished -= 1
            items += [None] * (not request.unfinished)
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nothing waits for the items
            request.loop.call_soon_threadsafe(self._put, request, items)

    def _put(self, request: _Request, items: Sequence[Item]) -> None:
        for item in items:
            if item is None:  # the answer is complete, even if nothing reads it any more
                self._free_place(request)
            request.pieces.put_nowait(item)

    def _free_place(self, request: _Request) -> None:
        if request.has_place:
            request.has_place = False
            self.leave()

    def abort(self) -> None:
        """End every answer, now and later, with the error that the server stops."""
        self._is_aborted = True
        for request in self._streamed:
            request.pieces.put_nowait(shutdown_error())
        for awaited in self._prepared:
            if not awaited.done():
                awaited.set_exception(shutdown_error())

    def close(self) -> None:
        """Wait for the answers in progress and free the engine."""
        self.engine.answers.close()
        self._before_close()
        self.engine.close()


def _api_error(error: BaseException) -> APIError:
    """Return the error of an engine or a generation as the client gets it."""
    if isinstance(error, UnanswerableError):
        return APIError(400, str(error))
    is_ours = isinstance(error, EfficientLLMError)
    message = str(error) if is_ours else f"the engine failed: {type(error).__name__}: {error}"
    return APIError(500, message, "server_error")


def _piece(choice: int, text: str, generation: Generation, finish_reason: str | None = None) -> Piece:
    records = tuple(generation.pop_logprobs())
    tokens = set()
    for record in records:
        tokens.add(record.token)
        tokens.update(other for other, _ in record.top)
    token_bytes = {token: generation.engine.token_bytes(token) for token in tokens}
    return Piece(choice, text, records, token_bytes, generation.stats.completion_tokens, finish_reason)
