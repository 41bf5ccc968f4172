"""What more tokens bring, from runs that follow a law that is known."""

from __future__ import annotations

import math

import pytest

from efficientllm.runtime.base.errors import UsageError
from research.token_law import RunPoint, fit

SCALE, EXPONENT = 3.0, 0.25


def made_run(tokens: int, parameters: int = 800, gap: float | None = None) -> RunPoint:
    return RunPoint("run", tokens, parameters, 1000, SCALE * tokens**-EXPONENT if gap is None else gap)


def test_a_law_is_found_again() -> None:
    law = fit([made_run(tokens) for tokens in (100_000, 10_000, 1_000_000)])
    assert law.exponent == pytest.approx(EXPONENT)
    assert math.exp(law.log_scale) == pytest.approx(SCALE)
    assert [point.tokens for point in law.points] == [10_000, 100_000, 1_000_000]
    assert law.gap(50_000) == pytest.approx(SCALE * 50_000**-EXPONENT)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (made_run(10_000), "at least two lengths"),
        (made_run(20_000, 500), "a law is of one pruning of one source"),
        (made_run(20_000, gap=-0.1), "no worse than its source"),
    ],
)
def test_points_that_make_no_law(other: RunPoint, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        fit([made_run(10_000), other])
