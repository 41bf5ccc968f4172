"""Errors of the API in OpenAI's shape, and one-line messages for bodies that pydantic refuses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .response_models import ErrorAnswer, ErrorDetail

MAX_MESSAGE_CHARACTERS = 2000
"""Longest error message. It may quote text of the request."""

MAX_FIELD_PARTS = 6
"""Most parts of a field's name that a message shows, from the beginning."""

NOT_FIELDS = re.compile(r"[A-Z]\w*(Item|Tool|Part|Schema|Function|Request)|.*\W.*|body|(Mapping|Sequence)\w*")
"""Names of classes and types that pydantic puts between fields, as in messages.0.content.list[TextPart].0."""


class APIError(Exception):
    """An error that is answered in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None, **sizes: int
    ) -> None:
        """Keep the body. `sizes` are further fields of ErrorDetail."""
        if len(message) > MAX_MESSAGE_CHARACTERS:
            message = message[:MAX_MESSAGE_CHARACTERS] + " ..."
        message = message.encode("utf-8", "backslashreplace").decode()  # a request may contain lone surrogates
        super().__init__(message)
        self.status = status
        detail = {"message": message, "type": kind, "code": code, **sizes}
        self.body = ErrorAnswer(error=ErrorDetail.model_validate(detail)).model_dump()


def context_error(message: str, num_tokens: int, context_length: int) -> APIError:
    """Return the error for a prompt that does not fit, with llama-server's type and OpenAI's code."""
    sizes = {"n_prompt_tokens": num_tokens, "n_ctx": context_length}
    return APIError(400, message, "exceed_context_size_error", "context_length_exceeded", **sizes)


def shutdown_error() -> APIError:
    """Return the error for requests that are unfinished when the server's grace period ends."""
    return APIError(503, "the server stops", "server_error")


def busy_error() -> APIError:
    """Return the error for requests beyond the queue of a model."""
    return APIError(429, "the server is busy; try again later", "rate_limit_error", "rate_limit_exceeded")


def unknown_model_error(name: str, known: Iterable[str]) -> APIError:
    """Return the error for a model that is not among `known`."""
    names = ", ".join(map(repr, known))
    return APIError(404, f"model {name!r} does not exist; this server has {names}", code="model_not_found")


def validation_message(errors: Sequence[Mapping[str, Any]]) -> str:
    """Return the most specific of pydantic's `errors()` of one body as one line that names the field."""
    error = min(errors, key=_vagueness)
    if not error["loc"]:
        return "the body is not a JSON object" if error["type"] != "value_error" else message_of(error)
    parts = [str(part) for part in error["loc"] if not NOT_FIELDS.fullmatch(str(part))]
    field = ".".join(parts[:MAX_FIELD_PARTS] + ["..."] * (len(parts) > MAX_FIELD_PARTS))
    return f"{field}: {message_of(error)}" if field else message_of(error)


def unreadable_message(cause: BaseException) -> str:
    """Return in one line why a body could not be parsed although its syntax is right."""
    if isinstance(cause, UnicodeDecodeError):
        reason = "it is not UTF-8"
    elif isinstance(cause, RecursionError):
        reason = "it is nested too deeply"
    else:
        reason = str(cause).partition("; use sys")[0]  # Python's advice about its limit of digits
    return f"the body cannot be read as JSON: {reason}"


def message_of(error: Mapping[str, Any]) -> str:
    """Return pydantic's message of one error, without the prefix that it puts before ours."""
    return error["msg"].removeprefix("Value error, ")


def _vagueness(error: Mapping[str, Any]) -> tuple[bool, bool, int]:
    """Return a key that sorts specific errors first.

    For a field of several forms, pydantic reports an error for each form, most of which the client did not mean. Our
    own messages are the most specific, errors of a type the least, and errors of deeper fields more than of outer ones.
    """
    kind, location = error["type"], error["loc"]
    return kind != "value_error", kind.endswith("_type"), -len(location)
