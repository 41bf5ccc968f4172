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

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.write(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n\r\n")
                transport.close()
            else:
                self._head_timer = self.loop.call_later(head_timeout, self._close_if_silent)

        def _close_if_silent(self) -> None:
            if self.cycle is None:
                self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
            super().connection_lost(exc)

    return LimitedProtocol
