"""Names: what was typed and is none of the known ones, and the one that was probably meant; and as others read them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from .errors import UsageError

SIMILAR = 0.7
"""Least similarity, 0 to 1, of what is proposed (difflib's ratio)."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean NAME?' where one of `known` is similar, else ''."""
    by_lower = {each.lower(): each for each in known}
    similar = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=SIMILAR)
    return f"; did you mean {by_lower[similar[0]]}?" if similar else ""


def none_of(name: object, known: Iterable[object]) -> str:
    """The rule that a value breaks which is none of `known`: 'is none of a, b; did you mean b?'."""
    names = [str(each) for each in known]
    return f"is none of {', '.join(names)}{did_you_mean(str(name), names)}"


def unknown_name(flag: str, name: str, known: Iterable[str], of: str = "") -> UsageError:
    """The error where `name`, the value of `flag`, is none of `known`; `of`: what they belong to, as ' for gguf'."""
    names = list(known)
    return UsageError(f"{flag} {name}: unknown{of}; known: {', '.join(names)}{did_you_mean(name, names)}")


def without_folders(name: str) -> str:
    """A model or corpus as others may read it: of an absolute path its last part."""
    return Path(name).name if Path(name).is_absolute() else name
