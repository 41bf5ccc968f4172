"""What more tokens bring, from runs that follow a law that is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.base.quantities import format_duration
from research.token_law import body, fit, read_point

SCALE, EXPONENT = 3.0, 0.25


def made_run(folder: Path, tokens: int, parameters: int = 800, gap: float | None = None) -> str:
    """A finished run of `tokens` at a speed of 500 tokens a second; returns its folder."""
    (folder / "model").mkdir(parents=True)
    ratio = math.exp(SCALE * tokens**-EXPONENT if gap is None else gap)
    summary = {
        "tokens": tokens,
        "seconds": tokens / 500,
        "parameters": parameters,
        "source_parameters": 1000,
        "quality": {"texts": {"all texts": {"ratio": ratio, "ratio_stderr": 0.01}}},
    }
    (folder / "model" / "training.json").write_text(json.dumps(summary))
    return str(folder)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [made_run(tmp_path / str(tokens), tokens) for tokens in (100_000, 10_000, 1_000_000)]


def test_a_law_is_found_again(runs: list[str]) -> None:
    law = fit([read_point(folder) for folder in runs])
    assert law.exponent == pytest.approx(EXPONENT)
    assert math.exp(law.log_scale) == pytest.approx(SCALE)
    assert [point.tokens for point in law.points] == [10_000, 100_000, 1_000_000]
    assert law.gap(law.tokens(0.05)) == pytest.approx(0.05)


def test_plan_names_tokens_and_hours(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "law.png"
    arguments = ["--within", "1.08", "--picture", str(picture)]
    assert run_command(body, [*runs, *arguments]) == 0
    shown = capsys.readouterr().out
    tokens = (SCALE / math.log(1.08)) ** (1 / EXPONENT)
    assert f"x1.08: about {tokens / 1e6:.1f}M tokens, " in shown
    assert f"{format_duration(tokens / 500)} on the machine of the longest run" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": 10_000}, "at least two lengths"),
        ({"tokens": 20_000, "parameters": 500}, "a law is of one pruning of one source"),
        ({"tokens": 20_000, "gap": -0.1}, "no worse than its source"),
    ],
)
def test_points_that_make_no_law(tmp_path: Path, change: dict[str, float], said: str) -> None:
    folders = [made_run(tmp_path / "one", 10_000), made_run(tmp_path / "two", **change)]  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=said):
        fit([read_point(folder) for folder in folders])


def test_law_refuses_missing_runs_and_distant_tokens(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(body, [str(tmp_path)]) == 2
    assert "is not a finished run" in capsys.readouterr().err
    arguments = ["--within", "1.0001"]
    assert run_command(body, [*runs, *arguments]) == 0
    assert "more than 1000 times the longest run away" in capsys.readouterr().out
