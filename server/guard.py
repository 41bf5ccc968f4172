"""What every request passes first: the key and the size of its body."""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse

from .schemas import APIError

Receive = Callable[[], Awaitable[dict[str, Any]]]


class Guard:
    """ASGI middleware: 403 for a foreign Host, 401 without the key, 413 for a body that is too large, whether or not it
    says its length."""

    def __init__(self, app: Any, api_key: str, max_body_bytes: int, hosts: frozenset[str] = frozenset()) -> None:
        """`hosts`: names that the server is called by; none: any. A page whose name was bound to this machine's address
        (DNS rebinding) may read what it is answered, but its browser sends that name."""
        self.app, self.api_key, self.max_body_bytes, self.hosts = app, api_key, max_body_bytes, hosts

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        if scope["type"] == "http" and self.hosts and (name := host_of(scope)) not in self.hosts:
            error = APIError(403, f"this server is not {name!r}; let it in with --allow-host, or set an --api-key")
            await JSONResponse(error.body, 403)(scope, receive, send)
            return
        if scope["type"] != "http" or not scope["path"].startswith("/v1/") or scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        is_key = hmac.compare_digest(given.strip(), self.api_key.encode()) and scheme.lower() == b"bearer"
        if self.api_key and not is_key:
            error = APIError(401, "invalid API key", code="invalid_api_key")
            await JSONResponse(error.body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        body = await self._read(receive, int(headers.get(b"content-length", b"0") or 0))
        if body is None:
            error = APIError(413, f"the body may have at most {self.max_body_bytes} bytes")
            await JSONResponse(error.body, 413, {"Connection": "close"})(scope, receive, send)
            return
        is_read = False

        async def replay() -> dict[str, Any]:
            nonlocal is_read
            if is_read:
                return await receive()  # http.disconnect, when it comes
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive, announced: int) -> bytes | None:
        """The whole body; None where it is too large."""
        if announced > self.max_body_bytes:
            return None
        parts, size = [], 0
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def host_of(scope: Any) -> str:
    """The name that the client called, without its port."""
    for name, value in scope["headers"]:
        if name.lower() == b"host":
            return re.sub(r":\d+$", "", value.decode("latin-1")).lower()
    return ""
