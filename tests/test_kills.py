"""kill -9 at random moments of a run: loading, steps, checkpoints, the final model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training import command, expect_same_run, without

KILLS = Path(__file__).with_name("tools") / "kills.py"


def outcome_of(folder: Path, options: list[str], arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, str(KILLS), *options, "--folder", str(folder), "--", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
    assert done.returncode == 0, done.stderr[-2000:] + said[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_four_kills_of_two_ranks_change_nothing(mode: str, source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    """Two come amid a checkpoint and a removal. Two end one rank, and the other ends by itself."""
    more = ["--data-parallel", mode, "--batch-size", "2", "--recover", "least-squares", "--recover-tokens", "256"]
    more += ["--removals", "4", "--saliency", "token-fisher", "--distill", "1"]
    arguments = without(command(source_folder, corpus, tmp_path), "--output")
    outcome = outcome_of(tmp_path, ["--kills", "4", "--amid", "2", "--ranks", "2"], [*arguments, *more])
    assert outcome["kills"] >= 4
    assert outcome["amid"].keys() == {"checkpoint", "removal"}
    for number in range(1, outcome["ends"]):
        expect_same_run(tmp_path / f"run-{number}", tmp_path / "run-0")


@pytest.mark.slow
def test_kills_change_nothing(straight: Path, source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = without(command(source_folder, corpus, tmp_path), "--output")
    outcome = outcome_of(tmp_path, ["--kills", "12", "--seed", "3"], arguments)
    assert outcome["kills"] == 12
    assert {"no checkpoint", "checkpoints"} <= outcome["found"].keys()
    for number in range(outcome["ends"]):
        expect_same_run(tmp_path / f"run-{number}", straight)
