"""What a request is refused with, as OpenAI's clients expect it."""

from __future__ import annotations

from typing import Any

LONGEST = 2000
"""Characters of a message; a request's own text may be in it."""


class APIError(Exception):
    """An error answered in OpenAI's shape."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        message = message if len(message) <= LONGEST else message[:LONGEST] + " ..."
        message = message.encode("utf-8", "backslashreplace").decode()  # halves of surrogate pairs out of a request
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": None, "code": code}}


def stopping() -> APIError:
    """What is said to whoever waits when the server's grace is over."""
    return APIError(503, "the server stops", "server_error")
