"""One engine behind a bounded queue: a thread of its own computes all answers together, never on the event loop.

The time that a request has, loading, waiting and answering together.

Work in a thread of its own, for which the end of the process does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...runtime.base.errors import EfficientLLMError, UnanswerableError, UsageError
from ...runtime.batch import Batch, Progress
from ...runtime.engines.owned import CLOSED, OwnedEngine
from ...runtime.generation import Generation, TokenLogprob
from ..schemas.error import APIError, stopping


@dataclass(frozen=True)
class Deadline:
    """When a request has had its time."""

    seconds: float
    """From its arrival."""
    at: float
    """By the event loop's clock."""

    @classmethod
    def from_now(cls, seconds: float) -> Deadline:
        return cls(seconds, asyncio.get_running_loop().time() + seconds)

    def error(self) -> APIError:
        """What the client is told."""
        return APIError(408, f"the answer took longer than {self.seconds:g} s", "timeout_error", "timeout")


T = TypeVar("T")


def in_thread(make: Callable[[], T]) -> asyncio.Future[T]:
    """What `make` returns or raises; unlike asyncio.to_thread's, the thread is no executor's, whose threads asyncio and
    the interpreter join before they end."""
    loop = asyncio.get_running_loop()
    made: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        try:
            result = make()
        except StopIteration as error:  # which a future cannot hold
            tell(made.set_exception, RuntimeError(f"{error!r} was not caught"))
        except BaseException as error:
            tell(made.set_exception, error)
        else:
            tell(made.set_result, result)

    def tell(settle: Callable[[Any], None], outcome: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(lambda: None if made.done() else settle(outcome))

    threading.Thread(target=work, daemon=True).start()
    return made


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


Item = Piece | BaseException | None
"""A piece, what went wrong, or the end."""


class _Answer:
    """One request's generations on their way through the batch."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self.choices = {id(generation): choice for choice, generation in enumerate(generations)}
        self.unfinished = len(generations)
        self.has_place = True
        self.pieces: asyncio.Queue[Item] = asyncio.Queue()


class EngineWorker:
    """Owns an engine: as many answers at once as it has sequences, and `waiting` more requests in line.

    Used on one event loop.
    """

    def __init__(self, engine: OwnedEngine, waiting: int, when_idle: Callable[[], None]) -> None:
        """`when_idle` is called when it is."""
        self.engine = engine
        self.capacity = waiting + engine.num_sequences
        self.embedding = asyncio.Lock()
        """Held by the request whose texts are turned into vectors: each of them has an evaluation of its own."""
        self.in_flight = 0
        """Requests that have a place: waiting, or being computed."""
        self.last_used = time.monotonic()
        self._when_idle = when_idle
        self._read_now = set[_Answer]()
        """Answers that somebody waits for."""
        self._prepared_now = set[asyncio.Future[Any]]()
        """What somebody waits for in `prepare`."""
        self._arrived: list[tuple[_Answer, Sequence[Generation]]] = []
        self._changed = threading.Condition()
        """Guards `_arrived` and `_is_closing`."""
        self._is_closing = False
        self._is_aborted = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._compute, name="engine", daemon=True)
        self._thread.start()

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

    async def prepare(self, make: Callable[[], T], deadline: Deadline) -> T:
        """What `make` makes of a request, in a thread of its own and in a place that was taken.

        Where this raises, APIError 408 at `deadline` say, the place is freed, but not before the thread has ended:
        compiling a grammar takes seconds and cannot be stopped.
        """
        if self._is_aborted:
            self.leave()
            raise stopping()
        working = in_thread(make)
        awaited = asyncio.shield(working)
        self._prepared_now.add(awaited)
        try:
            async with asyncio.timeout_at(deadline.at):
                return await awaited
        except BaseException as error:
            working.add_done_callback(self._leave_after)
            if isinstance(error, TimeoutError):
                raise deadline.error() from error
            raise
        finally:
            self._prepared_now.discard(awaited)

    def _leave_after(self, done: asyncio.Future[Any]) -> None:
        done.exception()  # else asyncio would complain that nobody saw it
        self.leave()

    def stream(self, generations: Sequence[Generation], deadline: Deadline) -> AsyncGenerator[Piece]:
        """Pieces of every generation, as they come, computed from now on in a place that was taken.

        Leaving the iteration stops the work within a token, or amid a long prompt. Raises APIError 408 at `deadline`.
        """
        answer = _Answer(generations)
        self._read_now.add(answer)
        if self._is_aborted:
            answer.pieces.put_nowait(stopping())
        self._loop = asyncio.get_running_loop()
        with self._changed:
            self._arrived.append((answer, generations))
            self._changed.notify()
        return self._read(answer, generations, deadline)

    async def _read(
        self, answer: _Answer, generations: Sequence[Generation], deadline: Deadline
    ) -> AsyncGenerator[Piece]:
        try:
            while True:
                try:
                    async with asyncio.timeout_at(deadline.at):  # wait_for of Python 3.11 may swallow a cancellation
                        piece = await answer.pieces.get()
                except TimeoutError as error:
                    raise deadline.error() from error
                if isinstance(piece, APIError):
                    raise piece
                if isinstance(piece, BaseException):
                    is_ours = isinstance(piece, EfficientLLMError)
                    if isinstance(piece, UnanswerableError):
                        raise APIError(400, str(piece)) from piece
                    message = str(piece) if is_ours else f"the engine failed: {type(piece).__name__}: {piece}"
                    raise APIError(500, message, "server_error") from piece
                if piece is None:
                    return
                yield piece
        finally:
            self._read_now.discard(answer)
            is_computed = [generation.cancel() for generation in generations]
            if not any(is_computed):  # else when the pass has ended; others' passes may take long
                self._free_place(answer)

    def _compute(self) -> None:
        """The thread: passes of the engine as long as there are answers, then wait for one."""
        batch, owners = Batch(self.engine), dict[int, _Answer]()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._arrived or self._is_closing or len(batch))
                arrived, self._arrived = self._arrived, []
                if self._is_closing and not arrived and not len(batch):
                    return
            for answer, generations in arrived:
                for generation in generations:
                    owners[id(generation)] = answer
                    batch.add(generation, answer)
            done = batch.abandon(UsageError(CLOSED)) if self._is_closing else []
            self._deliver(owners, done + batch.step())

    def _deliver(self, owners: dict[int, _Answer], progress: Sequence[Progress]) -> None:
        """Send what a pass made to who reads it: the loop is woken once, not by every answer."""
        items: list[tuple[_Answer, Item]] = []
        for one in progress:
            answer = owners[id(one.generation)]
            choice = answer.choices[id(one.generation)]
            try:
                if one.text:
                    items.append((answer, _piece(choice, one.text, one.generation)))
                end = one.error or _piece(choice, "", one.generation, one.generation.stats.finish_reason)
            except EfficientLLMError as error:  # the engine was closed
                end = error
            if one.is_over:
                del owners[id(one.generation)]
                answer.unfinished -= 1
                items.append((answer, end))
                if not answer.unfinished:
                    items.append((answer, None))
        if items and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, items)

    def _put(self, items: Sequence[tuple[_Answer, Item]]) -> None:
        for answer, item in items:
            if item is None:  # the answer is whole, also where nobody reads it any more
                self._free_place(answer)
            answer.pieces.put_nowait(item)

    def _free_place(self, answer: _Answer) -> None:
        if answer.has_place:
            answer.has_place = False
            self.leave()

    def abort(self) -> None:
        """Let every answer that somebody waits for, or will, end with an error that says why."""
        self._is_aborted = True
        for answer in self._read_now:
            answer.pieces.put_nowait(stopping())
        for awaited in self._prepared_now:
            if not awaited.done():
                awaited.set_exception(stopping())

    def close(self) -> None:
        """Wait for the answers in progress, then free the engine."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        self.engine.close()


def _piece(choice: int, text: str, generation: Generation, finish_reason: str | None = None) -> Piece:
    records = tuple(generation.take_logprobs())
    tokens = {token for record in records for token in (record.token, *(other for other, _ in record.top))}
    token_bytes = {token: generation.engine.token_bytes(token) for token in tokens}
    return Piece(choice, text, records, token_bytes, generation.stats.completion_tokens, finish_reason)
