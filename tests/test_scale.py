"""docs/scale.md and deploy/: files are valid, commands are understood, and two agents of torchrun run as one job."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from test_docs import ROOT, blocks
from training import command

from efficientllm.train.cli import build_parser, configuration

PAGE = ROOT / "docs" / "scale.md"
DEPLOY = ROOT / "deploy"


def scripts() -> Iterator[str]:
    """The Slurm file, and `run` of the SkyPilot file."""
    yield (DEPLOY / "slurm.sh").read_text(encoding="utf-8")
    yield from (each["run"] for each in files() if "run" in each)


def files() -> list[dict]:
    return [yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8")) for name in ("skypilot.yaml", "kubeflow.yaml")]


def launches() -> Iterator[list[str]]:
    """Every command of torchrun in the files and on the page, as words."""
    for script in [*scripts(), *blocks(PAGE, "text")]:
        for line in script.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "torchrun" in words:
                yield words[words.index("torchrun") :]
    for trainer in (each["spec"]["trainer"] for each in files() if each.get("kind") == "TrainJob"):
        yield [*trainer["command"], *trainer["args"]]


def parts(words: list[str]) -> tuple[list[str], list[str]]:
    """The flags of torchrun and those of the run."""
    start = words.index("-m")
    assert words[start + 1 : start + 3] == ["efficientllm.runtime.start", "train"]
    return words[1:start], words[start + 3 :]


def test_scripts_are_shell_and_files_name_their_kind() -> None:
    found = list(scripts())
    assert len(found) == 2
    for script in found:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    sky, job = files()
    assert {"resources", "file_mounts", "num_nodes", "run"} <= sky.keys()
    assert job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}


def test_commands_of_all_launchers_are_understood() -> None:
    from torch.distributed.run import get_args_parser

    found = list(launches())
    assert len(found) == 4
    for launcher, run in map(parts, found):
        values = build_parser().parse(run)
        del values["print_config"]
        assert configuration(values).run.resume_or_start
        numbers = [word if not word.startswith("$") else "2" for word in launcher]
        get_args_parser().parse_args([*numbers, "-m", "efficientllm.runtime.start", "train"])


@pytest.mark.slow
def test_two_agents_of_the_slurm_file_train_one_model(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    launcher, _ = parts(next(launches()))
    values = {"$SLURM_NNODES": "2", "$HEAD:29500": "127.0.0.1:29517", "$SLURM_JOB_ID": str(os.getpid()), "8": "1"}
    launcher = [values.get(word, word) for word in launcher]
    arguments = command(source_folder, corpus, tmp_path / "run", "--batch-size", "2", "--resume-or-start")
    run = ["-m", "efficientllm.runtime.start", "train", *arguments, "--tokens", "640"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launcher, "--local-addr", "127.0.0.1", *run],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("2 ranks (ddp)" in each for each in said) == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
