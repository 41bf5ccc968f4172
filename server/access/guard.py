"""Checks of every request before its endpoint: host name, key, and content type, size and time of its body."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from starlette.responses import JSONResponse

from ..schemas.api_error import APIError

Receive = Callable[[], Awaitable[dict[str, Any]]]
Refuse = Callable[[Any, APIError], JSONResponse]
"""Returns the answer with an error to the request of an ASGI scope."""

ABSOLUTE_FORM = re.compile(r"^https?://[^/]*/?")
"""Start of a path that clients send through a proxy (RFC 9112, 3.2.2)."""

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1", "[::1]")
"""Host names of this machine, as flags and browsers write them."""

OPEN_PATHS = re.compile(r"/|/page/[^/]*|(/v1)?/health|/openapi\.json")
"""Paths that need no key. Without it their answers name no model."""

UNTYPED_PATHS = re.compile(r"/api/.*")
"""Paths of Ollama's API, whose clients send no content type, or curl's for forms."""

DRAIN_SECONDS = 5.0
"""Longest time to receive the rest of a body that was refused."""

BODY = "efficientllm.body"
"""Key of the ASGI scope for the body of the request."""

TRUSTED = "efficientllm.trusted"
"""Key of the ASGI scope for whether the request has the key or no key is set."""


class Guard:
    """ASGI middleware that refuses requests.

    403 for a foreign Host, 401 without the key. For a body: 400 if its length is given twice, 415 if its content type
    is not JSON, 413 if it is too large, with or without Content-Length, and 408 if it does not arrive in time.
    """

    def __init__(
        self,
        app: Any,
        api_keys: Collection[str],
        max_body_bytes: int,
        hosts: frozenset[str] = frozenset(),
        body_timeout: float = 30.0,
        refuse: Refuse = lambda scope, error: JSONResponse(error.body, error.status),
    ) -> None:
        """Protect `app`. Without `api_keys` no key is needed. Empty `hosts` mean any host name.

        `refuse` returns the answer to a refused request.
        """
        self.app, self.max_body_bytes, self.hosts = app, max_body_bytes, hosts
        self.api_keys = [key.encode() for key in api_keys]
        self.body_timeout, self.refuse = body_timeout, refuse

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        scope["path"] = ABSOLUTE_FORM.sub("/", scope["path"])
        scope[TRUSTED] = self._has_key(headers)
        try:
            self._check_head(scope, headers)
            if scope["method"] == "POST":
                scope[BODY] = await self._read(receive, int(headers.get(b"content-length", b"0") or 0))
        except APIError as error:
            response = self.refuse(scope, error)
            response.headers.update({"WWW-Authenticate": "Bearer"} if error.status == 401 else {"Connection": "close"})
            if scope["method"] == "POST":
                await _send_and_drain(response, receive, send)
            else:
                await response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _has_key(self, headers: Mapping[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip() if scheme.lower() == b"bearer" else b""
        # a comparison that ends at the first wrong byte would tell by its time how many bytes are right
        return not self.api_keys or any(hmac.compare_digest(given, key) for key in self.api_keys)

    def _check_head(self, scope: Any, headers: Mapping[bytes, bytes]) -> None:
        """Raise APIError if the head of the request is refused."""
        # DNS rebinding: a foreign page whose name is bound to this machine's address could read answers, but its
        # browser sends that name
        if self.hosts and (name := _host(headers)) not in self.hosts:
            raise APIError(403, f"this server is not {name!r}; allow the name with --allow-host, or set an --api-key")
        if scope["method"] == "OPTIONS":
            return
        if not scope[TRUSTED] and not OPEN_PATHS.fullmatch(scope["path"]):
            raise APIError(401, "invalid API key", code="invalid_api_key")
        # a proxy may believe the other one and take the end of the body for a request
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise APIError(400, "Content-Length and Transfer-Encoding cannot be combined; send one of them")
        if scope["method"] == "POST" and not _has_json_type(scope["path"], headers):
            raise APIError(415, "the body must be JSON with the header Content-Type: application/json")

    async def _read(self, receive: Receive, announced: int) -> bytes:
        """Return the whole body. APIError 413 if it is too large, 408 if it does not arrive in time."""
        try:
            async with asyncio.timeout(self.body_timeout):
                body, is_whole = bytearray(), False
                # both: a body may be announced too large, or grow too large without an announcement
                while max(announced, len(body)) <= self.max_body_bytes and not is_whole:
                    message = await receive()
                    body += message.get("body", b"")
                    is_whole = not message.get("more_body", False)
        except TimeoutError as error:
            reason = f"the body did not arrive within {self.body_timeout:g} s"
            raise APIError(408, reason, "timeout_error", "timeout") from error
        if max(announced, len(body)) > self.max_body_bytes:
            raise APIError(413, f"the body may have at most {self.max_body_bytes} bytes")
        return bytes(body)


async def _send_and_drain(response: JSONResponse, receive: Receive, send: Any) -> None:
    """Send a refusal, then receive the rest of the body.

    A connection that is closed with unread data is reset, and the client may lose the answer. Many clients read it only
    after they have sent the whole body.
    """
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body"})


def _has_json_type(path: str, headers: Mapping[bytes, bytes]) -> bool:
    """Return False for a body that any web page can send: browsers ask before they send one that is called JSON."""
    content_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if content_type == b"application/json":
        return True
    is_from_page = b"origin" in headers or b"sec-fetch-site" in headers
    may_lack = content_type in (b"", b"application/x-www-form-urlencoded") and UNTYPED_PATHS.fullmatch(path)
    return bool(may_lack) and not is_from_page


def _host(headers: Mapping[bytes, bytes]) -> str:
    """Return the host name of the request, without its port."""
    return re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1")).lower()
