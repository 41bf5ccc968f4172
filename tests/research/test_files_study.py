"""The study of files by bytes, its table and front, and the proposals made of it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from latency import made_up_profile
from tiny import tiny_architecture

from efficientllm.runtime.base.command import run_command
from efficientllm.train import cli as train_cli
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.file_types import gguf_bytes
from efficientllm.train.planning import fit
from efficientllm.train.planning.fit import FitConfig, Measured, _timer, commands, kl_at, propose, read_front
from efficientllm.train.planning.points import Point
from research.study import __main__ as study
from research.study.files_report import is_on_front

POINTS = ("q4_0", "q2_k/q8_0+imatrix", "q4_0/q4_0@62MB", "q4_0/q4_0@62.5MB+qat", "q4_0+train", "q4_0/q8_0+qat")


@pytest.mark.parametrize("text", POINTS)
def test_a_point_is_read_as_it_is_written(text: str) -> None:
    assert str(Point.parse(text)) == text


def test_a_point_is_what_its_commands_make() -> None:
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
def test_what_is_no_point_is_one_line(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert [read.file_bytes for read in read_front(str(report.with_suffix(".jsonl")))] == [
        first["file_bytes"],
        second["file_bytes"],
    ]
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*.json")}
    assert run_command(study.body, arguments) == 0  # nothing is done twice
    assert changed == {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*.json")}


SHAPE = tiny_architecture(layers=(LayerShape(4, 2, 256),) * 3, hidden_size=256)


def front_of(*files: tuple[str, float, float]) -> list[Measured]:
    """Measured files of SHAPE's size: point, bytes as a share of the whole file's, KL."""
    found = []
    for text, share, kl in files:
        point = Point.parse(text)
        whole = gguf_bytes(SHAPE, point.kind, 0, point.head, point.head)
        found.append(Measured(point, round(share * whole), kl))
    return found


FRONT = front_of(
    ("q8_0", 1.0, 0.01),
    ("q4_0/q4_0+qat", 1.0, 0.2),
    ("q4_0/q4_0@62MB+qat", 0.8, 0.4),
    ("q2_k/q2_k", 1.0, 0.7),
    ("q5_0@50MB", 0.5, 0.0),  # a family whose whole file was not measured: nothing to compare with
)


def whole(kind: str) -> int:
    return gguf_bytes(SHAPE, kind, 0, kind, kind)


def test_the_proposal_is_the_closest_file_within_the_bytes() -> None:
    def found(max_bytes: float) -> Any:
        return propose(SHAPE, 0, FRONT, max_bytes, lambda point, size: None)

    assert str(found(1e9).point) == "q8_0"
    assert str(found(whole("q4_0") + 1).point) == "q4_0/q4_0+qat"
    pruned = found(0.9 * whole("q4_0"))
    assert pruned.point.target_bytes == int(0.9 * whole("q4_0"))
    assert pruned.kl == pytest.approx(0.3, abs=0.01)  # between two measured ones
    assert str(found(0.7 * whole("q4_0")).point) == "q2_k/q2_k"
    assert found(0.3 * whole("q4_0")) is None  # nobody measured so small a file


def test_the_proposal_keeps_to_the_milliseconds() -> None:
    def found(max_ms: float) -> Any:
        return propose(SHAPE, 0, FRONT, whole("q4_0"), lambda point, size: size / whole("q4_0"), max_ms)

    assert found(1.0).point.target_bytes is None
    assert 0.88 < found(0.9).file_bytes / whole("q4_0") <= 0.9
    assert str(found(0.7).point) == "q2_k/q2_k"


def test_beyond_what_was_measured_nothing_is_claimed() -> None:
    family = [each for each in FRONT if each.point.kind == "q4_0"]
    assert kl_at(family, 1.5) == 0.2
    assert kl_at(family, 0.79) is None


def test_the_front_holds_no_file_that_another_beats() -> None:
    rows = [{"file_bytes": size, "kl": kl} for size, kl in ((10, 0.5), (20, 0.6), (30, 0.1))]
    assert [is_on_front(row, rows) for row in rows] == [True, False, True]


def test_the_proposed_commands_are_those_of_the_study(tmp_path: Path) -> None:
    settings = FitConfig(output="small", learning_rate=2e-4)
    train, export = commands("demo", settings, Point.parse("q4_0/q4_0@62MB+qat"))
    program, *arguments = shlex.split(train)
    assert program == "efficientllm-train"
    values = train_cli.build_parser().parse(arguments)
    del values["print_config"]
    config = train_cli.configuration(values)
    assert (config.pruning.target_bytes, config.quantisation.qat, config.run.output) == (
        62_000_000,
        "q4_0",
        "small-run",
    )
    assert config.optimizer.learning_rate == 2e-4
    assert export == "efficientllm-export small-run --target gguf --output small"
    (export,) = commands("demo", FitConfig(output="small"), Point.parse("q4_0"))
    assert export == "efficientllm-export demo --target gguf --quantize q4_0 --output small"


def test_fit_prints_its_commands(source_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(fit.body, [str(source_folder), "--max-bytes", "1GB"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == f"efficientllm-export {source_folder} --target gguf --quantize q8_0 --output fitted"


def test_a_pruned_file_is_faster_by_the_profile() -> None:
    shape = tiny_architecture(layers=(LayerShape(9, 3, 1536),) * 4, hidden_size=576, head_dim=64)
    ms_of = _timer(shape, made_up_profile(), FitConfig(max_ms=1.0, device_profile="profile.json"))
    size = gguf_bytes(shape, "q4_0", 0, "q4_0", "q4_0")
    whole_ms = ms_of(Point.parse("q4_0/q4_0"), size)
    pruned_ms = ms_of(Point.parse("q4_0/q4_0@1MB+qat"), 0.7 * size)
    assert whole_ms is not None
    assert pruned_ms is not None
    assert 0.4 < pruned_ms / whole_ms < 0.9
    assert ms_of(Point.parse("q4_0/q4_0@1MB+qat"), 0.01 * size) is None
    assert ms_of(Point.parse("q8_0"), size) is None  # the profile is of q4_0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--max-bytes is missing"),
        (["--max-bytes", "1kB"], "no measured file fits into 1.0 kB; the smallest has "),
        (["--max-bytes", "1GB", "--max-ms", "8"], "--max-ms and --device-profile FILE go together"),
        (["--max-bytes", "1GB", "--front", "nothing.jsonl"], "--front nothing.jsonl: No such file"),
        (["--max-bytes", "1GB", "--learning-rate", "0"], "--learning-rate 0"),
    ],
)
def test_fit_refuses_in_one_line(
    flags: list[str], message: str, source_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(fit.body, [str(source_folder), *flags]) == 2
    assert message in capsys.readouterr().err
