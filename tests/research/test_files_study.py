"""The study of files by bytes, its table and its front."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny import tiny_architecture

from efficientllm.runtime.base.command import run_command
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.file_types import gguf_bytes
from research.study import __main__ as study
from research.study.files_report import is_on_front
from research.study.points import Point

POINTS = ("q4_0", "q2_k/q8_0+imatrix", "q4_0/q4_0@62MB", "q4_0/q4_0@62.5MB+qat", "q4_0+train", "q4_0/q8_0+qat")


@pytest.mark.parametrize("text", POINTS)
def test_points_survive_writing_and_reading(text: str) -> None:
    assert str(Point.parse(text)) == text


def test_commands_make_the_point_of_a_file() -> None:
    point = Point.parse("q4_0/q4_0@62MB+qat")
    assert (point.pruning.target_bytes, point.quantisation.qat) == (62_000_000, "q4_0")
    assert point.export_flags == []  # the checkpoint knows
    assert Point.parse("q2_k/q8_0+imatrix").export_flags[-2:] == ["--calibrate", "demo"]
    assert Point.parse("q4_0/q4_0@62MB").pruning.output_type == "q4_0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q4_1+qat", "+qat trains for q8_0, q4_0 with"),
        ("q9_9", "q9_9 is not one of f32"),
        ("q4_0/q9", "q9 is not one of"),
        ("q4_0+prune", "+prune is not one of"),
        ("q4_0@much", "much"),
    ],
)
def test_reader_refuses_other_points_in_one_line(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(study.body, ["--equal-bytes", "--points", text]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--points {text}" in line
    assert message in line


@pytest.mark.slow
def test_a_study_trains_exports_measures_and_reports(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    whole = gguf_bytes(tiny_architecture(layers=(LayerShape(4, 2, 128),) * 3), "q4_0", 8000, "q4_0", "q4_0")
    points = f"q8_0,q4_0/q4_0@{0.8 * whole / 1e6:.3f}MB+qat"
    arguments = ["--equal-bytes", "--source", str(source_folder), "--data", str(corpus), "--points", points]
    arguments += ["--tokens", "1024", "--sequence-length", "32", "--rounds", "0", "--output", str(tmp_path / "study")]
    rows = [{"goal": f"do {n}", "sol1": "this", "sol2": "that", "label": n % 2} for n in range(4)]
    (tmp_path / "piqa_validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments += ["--tasks", "piqa", "--data-dir", str(tmp_path)]
    report = tmp_path / "page" / "files.md"
    assert run_command(study.body, [*arguments, "--threads", "1", "--report", str(report)]) == 0
    first, second = (json.loads(line) for line in report.with_suffix(".jsonl").read_text().splitlines())
    assert first["file_bytes"] < second["file_bytes"]
    assert first["parameters"] < second["parameters"]
    assert 0 <= second["kl"] < first["kl"]  # eight bits of the source itself
    assert re.search(r"\| questions \| piqa \|\n", report.read_text())
    assert report.with_suffix(".png").stat().st_size > 10_000
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*.json")}
    assert run_command(study.body, arguments) == 0  # nothing is done twice
    assert changed == {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*.json")}


def test_the_front_holds_no_file_that_another_beats() -> None:
    rows = [{"file_bytes": size, "kl": kl} for size, kl in ((10, 0.5), (20, 0.6), (30, 0.1))]
    assert [is_on_front(row, rows) for row in rows] == [True, False, True]
