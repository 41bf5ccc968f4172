"""kill -9 at random moments of a run: loading, steps, checkpoints, the final model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training import command, expect_same_run, without

KILLS = Path(__file__).with_name("tools") / "kills.py"


@pytest.mark.slow
def test_thirty_kills_change_nothing(straight: Path, source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = without(command(source_folder, corpus, tmp_path), "--output")
    options = ["--kills", "30", "--seed", "3", "--folder", str(tmp_path), "--", *arguments]
    done = subprocess.run([sys.executable, str(KILLS), *options], capture_output=True, text=True, check=False)
    said = (tmp_path / "log.txt").read_text() if (tmp_path / "log.txt").exists() else ""
    assert done.returncode == 0, done.stderr[-2000:] + said[-2000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["kills"] == 30
    assert {"no checkpoint", "checkpoints"} <= outcome["found"].keys()
    for number in range(outcome["ends"]):
        expect_same_run(tmp_path / f"run-{number}", straight)
