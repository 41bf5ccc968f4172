"""The chat page for browsers. It loads nothing from other servers."""

from __future__ import annotations

from importlib import resources

from fastapi.responses import Response

from ..schemas.api_error import APIError

MEDIA_TYPES = {
    "index.html": "text/html",
    "style.css": "text/css",
    "api.js": "text/javascript",
    "markdown.js": "text/javascript",
    "chats.js": "text/javascript",
    "page.js": "text/javascript",
}
"""Files of the chat page."""

POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the chat page."""


def page_file(name: str) -> Response:
    """Return a file of the chat page. APIError 404 for any other name."""
    if name not in MEDIA_TYPES:
        raise APIError(404, f"the page has no file {name!r}")
    content = resources.files("efficientllm.server.page").joinpath("assets", name).read_bytes()
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return Response(content, media_type=f"{MEDIA_TYPES[name]}; charset=utf-8", headers=headers)
