"""Options as fields of dataclasses: types, ranges and messages."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.errors import OptionError, UsageError


@dataclass(frozen=True)
class Options:
    """options"""

    size: int = flags.number(4, at_least=1)
    """Rows."""
    share: float = flags.number(0.5, at_least=0, below=1)
    rate: float = flags.number(1e-3, above=0, below=math.inf)
    limit: float | None = flags.number(None, above=0, at_most=2)
    tokens: int = flags.count(1000, at_least=8)
    room: int = flags.byte_count(0, at_least=0)
    port: int = flags.number(80, at_least=1, at_most=99)
    lengths: tuple[int, ...] = flags.whole_numbers(1, 2, at_least=1)

    def __post_init__(self) -> None:
        flags.check_fields(self)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--size=0", "--size 0: must be positive"),
        ("--share=1", "--share 1.0: must be at least 0 and below 1"),
        ("--share=nan", "--share nan: must be at least 0 and below 1"),
        ("--rate=inf", "--rate inf: must be above 0 and finite"),
        ("--limit=0", "--limit 0.0: must be above 0 and at most 2"),
        ("--tokens=7", "--tokens 7: must be at least 8"),
        ("--tokens=1.5", "--tokens: '1.5' is no whole number; give a unit, such as 1.5M"),
        ("--room=-1", "--room: '-1' is not a number"),
        ("--room=60", "--room: 60 is that many bytes; give a unit, such as 60MB"),
        ("--port=100", "--port 100: must be between 1 and 99"),
        ("--lengths=3,0", "--lengths 3,0: must be positive"),
    ],
)
def test_a_number_outside_its_range_is_refused(flag: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        flags.take(flags.Parser(Options, prog="command").parse([flag]), Options)
    assert message in str(caught.value).replace("argument ", "")


@pytest.mark.parametrize(
    "values", [{"size": 1}, {"share": 0.0}, {"limit": None}, {"limit": 2}, {"tokens": 8}, {"port": 99}, {"lengths": ()}]
)
def test_bounds_belong_to_a_range_unless_they_are_excluded(values: dict[str, Any]) -> None:
    assert dataclasses.replace(Options(), **values)


def test_options_made_in_python_are_checked_as_well() -> None:
    with pytest.raises(OptionError, match=r"--size '4': must be of type int"):
        Options(size="4")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"--room -1: must not be negative"):
        Options(room=-1)
