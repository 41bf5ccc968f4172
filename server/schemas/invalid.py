"""What pydantic finds wrong with a request, in one line that names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

DEEPEST = 6
"""Parts of a field's name, from the beginning."""
MADE_UP = re.compile(r"[A-Z]\w*(Item|Tool|Part|Schema|Function|Request)|.*\W.*|body|(Mapping|Sequence)\w*")
"""What stands between the fields in pydantic's places: classes and types, as in messages.0.content.list[TextPart].0."""


def said_of(errors: Sequence[Mapping[str, Any]]) -> str:
    """Of pydantic's `errors()` of one body, what tells most."""
    error = min(errors, key=_vagueness)
    if error["type"] == "json_invalid":
        return f"the body is no JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
    if error["loc"] == ("body",):
        return "the body is no JSON object" if error["type"] != "value_error" else text_of(error)
    parts = [str(part) for part in error["loc"] if not MADE_UP.fullmatch(str(part))]
    place = ".".join(parts[:DEEPEST] + ["..."] * (len(parts) > DEEPEST))
    return f"{place}: {text_of(error)}" if place else text_of(error)


def unread(cause: BaseException) -> str:
    """Why a body that is no malformed JSON could not be read, in one line."""
    if isinstance(cause, UnicodeDecodeError):
        return "it is not UTF-8"
    return "it is nested too deeply" if isinstance(cause, RecursionError) else str(cause).partition("; use sys")[0]


def text_of(error: Mapping[str, Any]) -> str:
    """Its message; one of ours as we wrote it."""
    return error["msg"].removeprefix("Value error, ")


def _vagueness(error: Mapping[str, Any]) -> tuple[bool, bool, int]:
    """Where a field has several forms, pydantic says what is wrong with each, and most of them were not meant: a value
    of the wrong type says least, one of ours most, and one deep inside more than one above."""
    kind, place = error["type"], error["loc"]
    return kind != "value_error", kind.endswith("_type"), -len(place)
