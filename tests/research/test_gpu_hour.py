"""The script of the first hour on a GPU, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_first_hour_on_a_gpu_runs_on_the_cpu(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hour"
    command = [sys.executable, "-m", "research.gpu_hour", str(folder), "--device", "cpu", "--tiny"]
    command += ["--source", str(source_folder), "--data", str(corpus)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((folder / "gpu_hour.json").read_text())
    check = report["correctness"]
    assert check["exit_codes"] == [0, 0, -9, 0]
    assert check["steps"] == [20, 20, 20]
    assert check["events"] == 3
    assert check["removals_equal"]
    assert check["resumed_identically"]
    assert check["largest_loss_difference"] == 0
    assert [case["preset"] for case in report["cases"]] == ["gpu24-469m", "node8-1b"]
    for case in report["cases"]:
        assert case["tokens_per_second"] > 0, case
        assert (folder / f"trace-{case['preset']}-False-True.json").is_file()
        assert f"| {case['preset']} | False | True | {case['tokens_per_second']} |" in done.stdout
