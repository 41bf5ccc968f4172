"""The script of the first hour on a GPU, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training import ERRORS, run

from research import gpu_hour


@pytest.mark.slow
def test_the_first_hour_on_a_gpu_runs_on_the_cpu(
    source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    """The run that is killed and the timed cases are processes of their own; the other runs are this one's."""
    folder, start_process = tmp_path / "hour", subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        is_killed = str(folder / "killed") in command and "--resume" not in command
        if "efficientllm.runtime.start" in command and not is_killed:
            return SimpleNamespace(wait=lambda seconds: run(command[4:]))
        return start_process(command, **options)

    monkeypatch.setattr(gpu_hour.subprocess, "Popen", start)
    monkeypatch.setattr(gpu_hour, "CHECKED", (*gpu_hour.CHECKED, "--threads", "1"))
    options = ["--device", "cpu", "--tiny", "--source", str(source_folder), "--data", str(corpus)]
    monkeypatch.setattr(sys, "argv", ["gpu_hour", str(folder), *options])
    gpu_hour.main()
    printed = capsys.readouterr().out
    report = json.loads((folder / "gpu_hour.json").read_text())
    check = report["correctness"]
    assert check["exit_codes"] == [0, 0, -9, 0]
    assert check["steps"] == [20, 20, 20]
    assert check["events"] == 3
    assert check["removals_equal"]
    assert check["resumed_identically"]
    assert check["largest_loss_difference"] == 0
    assert [case["preset"] for case in report["cases"]] == ["gpu24-1b", "node8-8b"]
    for case in report["cases"]:
        assert case["tokens_per_second"] > 0, case
        assert (folder / f"trace-{case['preset']}-False-True.json").is_file()
        assert f"| {case['preset']} | False | True | {case['tokens_per_second']} |" in printed
