"""Parse and format quantities and names: counts (100M), sizes (60MB), durations, quartiles, tables, suggestions."""

from __future__ import annotations

import difflib
import math
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
    value = float(match.group(1).replace("_", "")) * units[match.group(2).lower()]
    if value == math.inf:
        raise ValueError(f"{text[:9]}... is too large")
    return round(value)


def parse_count(text: str) -> int:
    """Return 100_000_000 for '100M'. The units are k, M, B or G, and T. Raise ValueError for 1.5 without one."""
    if "." in text and not text.strip()[-1:].isalpha():
        raise ValueError(f"{text!r} is no whole number; give a unit, such as {text.strip()}M")
    return _parse(text, _COUNT_UNITS, "30000, 30k, 1.5M or 2B")


def parse_bytes(text: str) -> int:
    """Return 60_000_000 for '60MB' and 67_108_864 for '64MiB'. Raise ValueError for 1 to 999 without a unit."""
    count = _parse(text, {"": 1, **_BYTE_UNITS}, "60MB, 1.5GB or 64MiB")
    if 0 < count < 1000 and not text.strip()[-1].isalpha():
        raise ValueError(f"{text.strip()} is that many bytes; give a unit, such as {text.strip()}MB")
    return count


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def format_count(count: float) -> str:
    """Return '134.5M' for 134515008."""
    return _format(count, {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}, "")


def format_bytes(count: float) -> str:
    """Return '98.4 MB' for 98362432, in decimal units as file managers and model hubs use them."""
    return _format(count, {" GB": 1e9, " MB": 1e6, " kB": 1e3}, " B")


def _format(count: float, units: dict[str, float], base: str) -> str:
    """Return `count` in the first of `units` that it reaches, else in `base`."""
    for unit, scale in units.items():
        if abs(count) >= scale:
            return f"{count / scale:.1f}{unit}"
    return f"{count:.0f}{base}"


def format_duration(seconds: float) -> str:
    """Return '1:02:05' for 3725 and '1:05' for 65."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


SIMILAR = 0.7
"""Least similarity of a suggestion, as difflib's ratio from 0 to 1."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean NAME?' if one of `known` is similar to `name`, else ''."""
    by_lower = {each.lower(): each for each in known}
    similar = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=SIMILAR)
    return f"; did you mean {by_lower[similar[0]]}?" if similar else ""


def not_one_of(name: object, known: Iterable[object]) -> str:
    """Return the rule that `name` breaks, such as 'is not one of a, b; did you mean b?'."""
    names = [str(each) for each in known]
    return f"is not one of {', '.join(names)}{did_you_mean(str(name), names)}"


def unknown_name(flag: str, name: str, known: Iterable[str], of: str = "") -> UsageError:
    """Return the error for a value `name` of `flag` that is not in `known`. `of` is a suffix such as ' for gguf'."""
    names = list(known)
    return UsageError(f"{flag} {name}: unknown{of}; known: {', '.join(names)}{did_you_mean(name, names)}")


def display_name(name: str) -> str:
    """Return the name of a model or corpus for publication. An absolute path is shortened to its last part."""
    return Path(name).name if Path(name).is_absolute() else name


def markdown_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Return a Markdown table of `rows`, header first. Columns that are not in `left` are aligned to the right."""
    header, *body = rows
    marks = ["---" if index in left else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, marks, *body))


def print_rows(rows: Sequence[Sequence[str]], left: Collection[int] = (0,), narrow_width: int = 100) -> None:
    """Print a table of `rows`, header first. Columns that are not in `left` are aligned to the right.

    A terminal of less than 100 characters gets lines of `narrow_width`.
    """
    from rich.console import Console
    from rich.table import Table

    header, *body = rows
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index in left else "right", overflow="fold")
    for row in body:
        table.add_row(*row)
    width = Console().width
    Console(width=width if width >= 100 else narrow_width, markup=False).print(table)


@dataclass(frozen=True)
class Figure:
    """Median and quartiles of a quantity over all repetitions."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Return the figure of at least one value, with inclusive quartiles."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    @property
    def digits(self) -> int:
        """Return the number of decimals that shows two or three digits."""
        return 0 if self.median >= 20 else 1 if self.median >= 2 else 2

    def describe(self, digits: int = 1) -> str:
        """Return 'median (low-high)'."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"
