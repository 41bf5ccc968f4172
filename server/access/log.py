"""Give every request an id, and print a line for each if the server is asked to."""

from __future__ import annotations

import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any

REQUEST_ID = b"x-request-id"
"""Header with the id of a request, in the answer and, if the client chooses the id, in the request."""

MAX_CHARACTERS = 200
"""Longest path or reason in a line."""


def escaped(text: str) -> str:
    """Return the beginning of a client's text in a form that cannot begin a line or control a terminal."""
    return text[:MAX_CHARACTERS].encode("unicode_escape").decode()


class AccessLog:
    """ASGI middleware that adds ids to answers and, if it `prints`, prints lines.

    An example: 2026-11-28T09:53:11Z 127.0.0.1 POST /v1/chat/completions 200 5321 bytes 0.812 s 8c4f
    """

    def __init__(self, app: Any, prints: bool) -> None:
        self.app, self.prints = app, prints

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(REQUEST_ID, b"")
        identity = given if re.fullmatch(rb"[\w.:-]{1,128}", given) else uuid.uuid4().hex.encode()
        began, status, size = time.perf_counter(), 0, 0

        async def record(message: Any) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID, identity)]
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, record)
        finally:
            if self.prints:
                host, *_ = scope.get("client") or ("-",)
                path = escaped(scope["path"]).replace(" ", "%20")
                now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                seconds = time.perf_counter() - began
                served = f"{status or '-'} {size} bytes {seconds:.3f} s {identity.decode()}"
                print(f"{now} {host} {scope['method']} {path} {served}", flush=True)
