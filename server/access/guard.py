"""What every request passes first: the host it names, the key, and the size, kind and time of its body.

Names of this machine for itself. Imports nothing of the web.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import JSONResponse

from ..schemas.error import APIError

Receive = Callable[[], Awaitable[dict[str, Any]]]

OPEN_PATHS = re.compile(r"/|/page/[^/]*|/health|/docs|/openapi\.json")
"""What is answered without the key, and names no model then."""

TRUSTED = "efficientllm.trusted"
"""Key of the ASGI scope: whether the request brought the key, or none is set."""


class Guard:
    """ASGI middleware: 403 for a foreign Host, 401 without the key, 415 for a body that does not say that it is JSON,
    413 for one that is too large, whether or not it says its length, 408 for one that does not come."""

    def __init__(
        self,
        app: Any,
        api_key: str,
        max_body_bytes: int,
        hosts: frozenset[str] = frozenset(),
        body_timeout: float = 30.0,
        count: Callable[[int], None] = lambda status: None,
    ) -> None:
        """`hosts`: names that the server is called by; none: any. A page whose name was bound to this machine's address
        (DNS rebinding) may read what it is answered, but its browser sends that name. `count` is told every status that
        something is refused with."""
        self.app, self.api_key, self.max_body_bytes, self.hosts = app, api_key, max_body_bytes, hosts
        self.body_timeout = body_timeout
        self.count = count

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        scope[TRUSTED] = self._has_key(headers)
        error = self._refusal(scope, headers)
        if error is not None:
            challenge = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {"Connection": "close"}
            self.count(error.status)
            await JSONResponse(error.body, error.status, challenge)(scope, receive, send)
            return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(receive, int(headers.get(b"content-length", b"0") or 0))
        except APIError as error:
            self.count(error.status)
            await JSONResponse(error.body, error.status, {"Connection": "close"})(scope, receive, send)
            return
        is_read = False

        async def replay() -> dict[str, Any]:
            nonlocal is_read
            if is_read:
                return await receive()  # http.disconnect, when it comes
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _has_key(self, headers: Mapping[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        is_key = hmac.compare_digest(given.strip(), self.api_key.encode()) and scheme.lower() == b"bearer"
        return is_key or not self.api_key

    def _refusal(self, scope: Any, headers: Mapping[bytes, bytes]) -> APIError | None:
        """What the head of the request is refused for."""
        if self.hosts and (name := _host(headers)) not in self.hosts:
            return APIError(403, f"this server is not {name!r}; let it in with --allow-host, or set an --api-key")
        if scope["method"] == "OPTIONS":
            return None
        if not scope[TRUSTED] and not OPEN_PATHS.fullmatch(scope["path"]):
            return APIError(401, "invalid API key", code="invalid_api_key")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # other kinds a page from anywhere may send without asking first
        if scope["method"] == "POST" and kind != b"application/json":
            return APIError(415, "the body must be JSON and say so: Content-Type: application/json")
        return None

    async def _read(self, receive: Receive, announced: int) -> bytes:
        """The whole body; APIError 413 where it is too large, 408 where it does not come."""
        try:
            async with asyncio.timeout(self.body_timeout):
                body, is_whole = bytearray(), False
                while max(announced, len(body)) <= self.max_body_bytes and not is_whole:
                    message = await receive()
                    body += message.get("body", b"")
                    is_whole = not message.get("more_body", False)
        except TimeoutError as error:
            reason = f"the body did not come within {self.body_timeout:g} s"
            raise APIError(408, reason, "timeout_error", "timeout") from error
        if max(announced, len(body)) > self.max_body_bytes:
            raise APIError(413, f"the body may have at most {self.max_body_bytes} bytes")
        return bytes(body)


def _host(headers: Mapping[bytes, bytes]) -> str:
    """The name that the client called, without its port."""
    return re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1")).lower()


LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1", "[::1]")
"""As flags and browsers write them."""
