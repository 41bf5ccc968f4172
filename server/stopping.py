"""How the server stops: answers in progress have some seconds to end, and what has not ended then is told why."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

AFTER_THAT = 5
"""Seconds that clients have to read why their answers end, before uvicorn cuts their connections."""


class StoppingServer(uvicorn.Server):
    """uvicorn's server, which by itself would cancel what goes on in the middle of a response."""

    def __init__(self, app: Any, end_answers: Callable[[], None], grace: float, **settings: Any) -> None:
        """`grace`: seconds between the signal and `end_answers`."""
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=int(grace) + AFTER_THAT, **settings))
        self._end_answers, self._grace = end_answers, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._grace, self._end_answers)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
