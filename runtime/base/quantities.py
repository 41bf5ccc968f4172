"""Counts and byte sizes as people type and read them: 100M, 30k, 60MB.

Names: what was typed and is none of the known ones, and the one that was probably meant; and as others read them.

Tables in Markdown.

A measured quantity as median and quartiles.
"""

from __future__ import annotations

import difflib
import re
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError

_COUNT_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000, "b": 1_000_000_000, "t": 1_000_000_000_000}
_BYTE_UNITS = {
    "b": 1,
    "kb": 1_000,
    "mb": 1_000_000,
    "gb": 1_000_000_000,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}


def _parse(text: str, units: dict[str, int], example: str) -> int:
    match = re.fullmatch(r"\s*([0-9_]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match.group(2).lower() not in units:
        raise ValueError(f"{text!r} is not a number like {example}")
    return round(float(match.group(1).replace("_", "")) * units[match.group(2).lower()])


def parse_count(text: str) -> int:
    """'100M' -> 100_000_000, '30k' -> 30_000; decimal units k, M, B (or G), T."""
    return _parse(text, _COUNT_UNITS, "30000, 30k, 1.5M or 2B")


def parse_bytes(text: str) -> int:
    """'60MB' -> 60_000_000, '64MiB' -> 67_108_864."""
    return _parse(text, {"": 1, **_BYTE_UNITS}, "60MB, 1.5GB or 64MiB")


def format_count(count: float) -> str:
    """134515008 -> '134.5M'."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.1f}{unit}"
    return f"{count:.0f}"


def format_bytes(count: float) -> str:
    """98362432 -> '98.4 MB' (decimal megabytes, as file managers and model hubs count)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def format_duration(seconds: float) -> str:
    """3725 -> '1:02:05', 65 -> '1:05'."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


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


def markdown_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """`rows`, header first, all of one length, as a table without a final newline; columns not in `left` end right."""
    header, *body = rows
    marks = ["---" if index in left else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, marks, *body))


@dataclass(frozen=True)
class Figure:
    """One quantity over all repetitions."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Of at least one value; quartiles are inclusive, those of a single value are the value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    @property
    def digits(self) -> int:
        """Behind the point, so that two or three are shown."""
        return 0 if self.median >= 20 else 1 if self.median >= 2 else 2

    def describe(self, digits: int = 1, unit: str = "") -> str:
        """'median unit (low-high)'."""
        unit = f" {unit}" if unit else ""
        return f"{self.median:.{digits}f}{unit} ({self.low:.{digits}f}-{self.high:.{digits}f})"
