"""A real pruned model on 64-bit ARM: a board without a compiler measures it and answers as this machine does."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import figures
import pytest
from arm64_board import ROOT, arm64_board
from board import Board

from efficientllm.devices import cli
from efficientllm.devices.board_environment import DEFAULT_WHEELS
from efficientllm.export import cli as export_cli
from efficientllm.runtime.base.command import run_command
from efficientllm.train import cli as train_cli

QUICK = ["--prompt-tokens", "8", "--decode-tokens", "4", "--depths", "8", "--repetitions", "1", "--rounds", "1"]
TARGETS = {"gguf": "q8_0", "onnx": "int8"}
ANSWER = ["--max-tokens", "8", "--temperature", "0", "--context", "256", "--threads", "1"]
QUESTION = "What is the capital of France?"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ROOT, reason="EFFICIENTLLM_ARM64_ROOT names no Debian for arm64 (make test-arm64)"),
    pytest.mark.xdist_group("arm64"),
]


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SmolLM2-135M at 85 % of its parameters, in two formats."""
    folder = tmp_path_factory.mktemp("pruned")
    run = ["--source", "demo", "--data", "demo", "--target-ratio", "0.85", "--tokens", "1024", "--batch-size", "1"]
    run += ["--sequence-length", "128", "--eval-tokens", "128", "--no-quality", "--saliency", "token-fisher"]
    run += ["--prune-start", "0.5", "--prune-end", "0.5", "--recover", "least-squares", "--recover-tokens", "2048"]
    assert run_command(train_cli.body, [*run, "--checkpoint-every", "0", "--output", str(folder / "run")]) == 0
    found = {}
    for target, quantize in TARGETS.items():
        found[target] = folder / target
        arguments = [str(folder / "run"), "--target", target, "--quantize", quantize, "--output", str(found[target])]
        assert run_command(export_cli.body, arguments) == 0
    return found


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    with arm64_board(tmp_path_factory.mktemp("arm64")) as made:
        yield made


def test_a_board_without_a_compiler_measures_and_answers_as_this_machine_does(
    artefacts: dict[str, Path],
    arm: Board,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    assert not shutil.which("c++", path=str(arm.home.parent / "usr/bin"))
    command = [*map(str, artefacts.values()), "--device", "ssh://board", "--ssh", arm.client, "--threads", "1", *QUICK]
    command += ["--engine-wheels", str(DEFAULT_WHEELS), "--json", str(tmp_path / "board.json")]
    assert run_command(cli.body, command) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    run = json.loads((tmp_path / "board.json").read_text())
    device = run["device"]
    assert (device["machine"], device["emulator"]) == ("aarch64", "qemu-user")
    assert "EMULATED (qemu-user)" in printed.out
    for result in run["results"]:
        assert set(result["speeds"]) == {"pp8", "tg4", "tg4@d8"}
        assert result["peak_rss_bytes"] > 0
        assert result["cpu_ms_per_token"]["tg4"]["median"] > 0
        assert result["load_ms"]["median"] > 0
    for (target, artefact), result in zip(artefacts.items(), run["results"], strict=True):
        asked = [QUESTION, *ANSWER, *(["--kv-cache", "f16"] if target == "gguf" else [])]
        here = _answer([f"{Path(sys.executable).parent}/efficientllm-chat", str(artefact), *asked])
        environment = next(arm.store.glob(f"env-{target}-*"))
        place = next(arm.store.glob(f"artefacts/{result['sha256'][:32]}"))
        programs, model = (path.relative_to(arm.home) for path in (environment / "bin", place))
        line = shlex.join([f"{programs}/efficientllm-chat", str(model), *asked])
        there = _answer([*shlex.split(arm.client), "board", line])
        record_property(figures.PROPERTY, f"aarch64 (qemu-user), {result['engine_version']}: {there!r}")
        assert there == here
        assert len(there) > 10


def _answer(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
