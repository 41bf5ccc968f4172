"""Limits of the connections that clients hold: how many, and how long one may stay silent before its request."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

KEEP_ALIVE_SECONDS = 30
"""How long a connection may wait for its next request. uvicorn's 5 seconds are also httpx', and so OpenAI's client's: a
request could be sent just as the connection is closed, and be lost."""


def limited_protocol(max_connections: int, head_timeout: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes connections beyond `max_connections` at once and those that have sent no whole
    request head after `head_timeout` seconds: uvicorn itself waits for ever, and out of files it cannot answer anybody.
    """

    class LimitedProtocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None
        """Runs from the connection, or the first bytes after an answer, until a request's head is whole."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.write(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n\r\n")
                transport.close()
            else:
                self._await_head()

        def data_received(self, data: bytes) -> None:
            self._await_head()
            super().data_received(data)
            if self._is_asked():
                self._stop_waiting()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _is_asked(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _await_head(self) -> None:
            if self._head_timer is None and not self._is_asked():
                self._head_timer = self.loop.call_later(head_timeout, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return LimitedProtocol
