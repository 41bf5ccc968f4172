"""Training on a CUDA device that is not there: the same removals as on the CPU, and few waits of the host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("gpu gate"),
    pytest.mark.skipif(
        torch.version.cuda is not None or shutil.which("g++") is None or sys.platform != "linux",
        reason="the device that is not there needs Linux, g++ and a torch without CUDA",
    ),
]


@pytest.fixture(scope="module")
def gate(source_folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the findings of tests/tools/gpu_gate.py, from one process that compiles and imports once."""
    folder = tmp_path_factory.mktemp("gate")
    command = [sys.executable, "-m", "tests.tools.gpu_gate", source_folder, corpus, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kind_of_run_is_the_same_on_a_gpu(gate: dict[str, Any]) -> None:
    """Every saliency, kind of group and QAT grid, with a stop, a checkpoint and a resume between two removals."""
    found = gate["runs"]
    assert len(found) >= 10
    for name, devices in found.items():
        cpu, cuda = devices["cpu"], devices["cuda"]
        assert not any("retokenization" in line for line in devices["waits"]), name  # a thread converts tokens
        assert sum("removed" in record for record in cuda) >= 3, name
        if name == "rounded":  # bf16 sums differ
            assert cuda[-1]["tokens"] == cpu[-1]["tokens"]
            continue
        assert [record.get("removed") for record in cuda] == [record.get("removed") for record in cpu], name
        losses = [[record["loss"] for record in records if "loss" in record] for records in (cpu, cuda)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5), name


def test_an_operation_on_tensors_of_two_devices_fails(gate: dict[str, Any]) -> None:
    assert "expected all tensors on the same device" in gate["mixed"]
