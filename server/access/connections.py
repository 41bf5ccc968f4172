"""uvicorn with limits on connections, on the wait for a request, and on answers at its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

KEEP_ALIVE_SECONDS = 30
"""Longest time that a connection waits for its next request.

uvicorn's default of 5 seconds is also the client's in httpx, which OpenAI's client uses. A request could then be sent
just as its connection is closed, and be lost.
"""

CLOSE_SECONDS = 5
"""Time for clients to read why their answers end, before uvicorn closes their connections."""


PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""Interim answer, which clients skip. The system of a client that has closed its connection refuses it."""

FIRST_PROBE_SECONDS, LONGEST_PROBE_SECONDS = 0.002, 1.0
"""Time between the first two probes, and limit of the later ones, of which each waits twice as long."""


def limited_protocol(max_connections: int, timeout: float) -> type[H11Protocol]:
    """Return uvicorn's protocol with limits.

    It closes connections beyond `max_connections` at once, and those without a whole request head after `timeout`
    seconds. It aborts those whose client reads nothing for as long.

    A client that closes only its own side after a request gets its answer. The end of its data looks the same if it has
    gone, so the server sends `PROBE` until the answer starts.
    """
    # uvicorn itself waits forever, and a server without free file descriptors cannot answer anybody

    class LimitedProtocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None
        """Runs from the connection, or the first bytes after an answer, until the head of a request is whole."""
        _write_timer: asyncio.TimerHandle | None = None
        """Runs while the client has not read all that was written."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(0)  # also a short answer that nobody reads pauses writing
            if len(self.connections) > max_connections:
                transport.write(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n\r\n")
                transport.close()
            else:
                self._start_timer()

        def data_received(self, data: bytes) -> None:
            self._start_timer()
            super().data_received(data)
            if self._has_request():
                self._stop_timer()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._await_reader()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_write_timer()

        def eof_received(self) -> bool:  # type: ignore[override]
            """Return True to keep the connection for the answer."""
            cycle = self.cycle
            if not self._has_request() or cycle.more_body or cycle.response_started:
                return False
            if cycle.scope["http_version"] != "1.1":  # an older client knows no interim answers
                return False
            cycle.keep_alive = False
            self._probe(FIRST_PROBE_SECONDS)
            return True

        def _probe(self, seconds: float) -> None:
            """Send an interim answer, and the next after `seconds`. They end the connection if the client has gone."""
            if self._has_request() and not self.cycle.response_started and not self.transport.is_closing():
                self.transport.write(PROBE)
                self.loop.call_later(seconds, self._probe, min(2 * seconds, LONGEST_PROBE_SECONDS))

        def _await_reader(self, unread: float = float("inf")) -> None:
            """Abort the connection if no byte of the `unread` ones was read, else look again later."""
            left = self.transport.get_write_buffer_size()
            if left >= unread:
                self.transport.abort()  # `close` would wait for the reader
            else:
                self._write_timer = self.loop.call_later(timeout, self._await_reader, left)

        def _stop_write_timer(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            self._stop_write_timer()
            super().connection_lost(exc)

        def _has_request(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _start_timer(self) -> None:
            if self._head_timer is None and not self._has_request():
                self._head_timer = self.loop.call_later(timeout, self.transport.close)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return LimitedProtocol


def notify_systemd(state: str) -> None:
    """Send READY=1 or STOPPING=1 to systemd, if it started the server as a service of Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):  # an abstract socket, whose name begins with NUL (sd_notify(3))
        address = address.replace("@", "\0", 1)
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
            sender.sendto(state.encode(), address)


class GracefulServer(uvicorn.Server):
    """uvicorn's server, which listens before it loads and has a grace period for answers in progress.

    uvicorn itself cancels them in mid-response, and closes every log handler of the process by its own log_config.
    """

    def __init__(
        self,
        app: Any,
        load: Callable[[], Coroutine[Any, Any, None]],
        end_answers: Callable[[], None],
        grace_seconds: int,
        **settings: Any,
    ) -> None:
        """Serve `app`, and call `end_answers` `grace_seconds` after the signal to stop. `settings` are uvicorn's.

        `load` is awaited once the server listens. If it fails, the server stops.
        """
        timeout = grace_seconds + CLOSE_SECONDS
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=timeout, log_config=None, **settings))
        self._load, self._end_answers, self._grace_seconds = load, end_answers, grace_seconds
        self._loading: asyncio.Task[None] | None = None
        self.load_error: BaseException | None = None
        """Error of `load`, after the server has stopped because of it."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._loading = asyncio.create_task(self._load())
            self._loading.add_done_callback(self._end_loading)

    def _end_loading(self, loading: asyncio.Task[None]) -> None:
        if loading.cancelled():
            return
        self.load_error = loading.exception()
        if self.load_error is None:
            notify_systemd("READY=1")
        else:
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        notify_systemd("STOPPING=1")
        if self._loading is not None:
            self._loading.cancel()
        timer = asyncio.get_running_loop().call_later(self._grace_seconds, self._end_answers)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
