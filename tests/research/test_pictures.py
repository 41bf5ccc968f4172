"""The study's pictures, drawn from the figures that docs/results has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from efficientllm.train.evaluation.evaluate import Evaluation
from research.study.figure import plot_perplexities
from research.study.files_report import draw_front
from research.study.result import StudyResult

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def drawn(draw: Callable[[Path], None]) -> list[Any]:
    """The panels of the figure that `draw` would save."""
    with TemporaryDirectory() as folder, mock.patch.object(Figure, "savefig", autospec=True) as saved:
        draw(Path(folder) / "picture.png")
    figure = saved.call_args.args[0]
    figure.draw_without_rendering()
    return figure.axes


def test_no_name_of_a_file_covers_the_front() -> None:
    rows = [json.loads(line) for line in (RESULTS / "files.jsonl").read_text(encoding="utf-8").splitlines()]
    (axes,) = drawn(lambda path: draw_front(rows, path))
    (front,) = (line for line in axes.lines if line.get_label() == "front")
    corners = axes.transData.transform(front.get_xydata())
    lines = [
        Bbox(ends) for one, two in pairwise(corners) for ends in ([one, [two[0], one[1]]], [two, [two[0], one[1]]])
    ]
    assert len(axes.texts) == len(rows)
    assert [text.get_text() for text in axes.texts if text.get_window_extent().count_overlaps(lines)] == []


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_bars_start_at_zero_and_no_line_of_seeds_looks_like_a_minus_sign(keep: float) -> None:
    for axes in drawn(lambda path: plot_perplexities(list(shown_results()), keep, path)):
        assert axes.get_xlim()[0] == 0
        assert axes.get_xscale() == "linear"
        for line, text in zip(axes.lines, axes.texts, strict=True):
            end, _ = axes.transData.transform((max(line.get_xdata()), 0))
            assert text.get_window_extent().x0 > end


def shown_results() -> Iterator[StudyResult]:
    """The study's results, as the page's JSON has them."""
    for values in json.loads((RESULTS / "results.json").read_text(encoding="utf-8"))["results"]:
        yield StudyResult(**values | {"architecture": None, "evaluation": Evaluation.from_dict(values["evaluation"])})
