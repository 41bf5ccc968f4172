"""Counts and byte sizes as people type and read them: 100M, 30k, 60MB."""

from __future__ import annotations

import re

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
