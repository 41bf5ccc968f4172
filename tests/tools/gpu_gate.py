"""Run training on a CUDA device that is not there (`fake_cuda.py`), in a process of its own:

    python -m tests.tools.gpu_gate SOURCE CORPUS FOLDER

Every path of a run is compared with the same run on the CPU. It is stopped and resumed after a few steps. The findings
are one line of JSON.
"""

# ruff: noqa: E402  # fake_cuda comes before torch

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from fake_cuda import fake_cuda  # isort: skip

import torch
from training import command, metrics, run

from efficientllm.train import run as training_run
from efficientllm.train.loop.trainer import Trainer

RUNS: dict[str, str] = {
    "taylor1": "--prune attention,ffn,stem,blocks --block-tokens 128",
    "taylor2": "--saliency taylor2 --prune attention,ffn,stem --gradient-accumulation 2 --batch-size 2",
    "fisher": "--saliency fisher --prune layers,ffn --block-tokens 128 --gradient-accumulation 2 --batch-size 2",
    "magnitude": "--saliency magnitude --qat q4_0",
    "random": "--saliency random",
    "flap": "--saliency flap --prune attention,ffn --distill 1 --layout uniform",
    "wanda": "--saliency wanda --prune attention,ffn --weight-update obs",
    "minitron": "--saliency minitron --prune attention,ffn --qat int4-block32",
    "token-fisher": "--saliency token-fisher --recover least-squares --recover-tokens 256 --distill 1 "
    "--prune attention,ffn,vocabulary,blocks --block-tokens 128 --vocabulary-tokens 2000 --activation-checkpointing",
    "rounded": "--saliency token-fisher --prune attention,ffn,vocabulary --vocabulary-rows 384 --distill 1 --qat 8da4w "
    "--vocabulary-tokens 2000 --recover least-squares --recover-tokens 256 --dtype bfloat16",
}
"""Arguments of each run. Together they have every saliency, kind of group and QAT grid. The last is not as on the CPU,
because both devices round other sums to bf16."""
SHARED = ("--tokens", "640", "--eval-tokens", "64", "--checkpoint-every", "0")
SHARED += ("--prune-start", "0.2", "--prune-end", "0.8", "--removals", "3")
"""Five steps, with removals after the first, the third and the fourth."""
STOP_AT = 2
"""Step after which a run on the GPU is stopped and resumed."""


def runs(source: Path, corpus: Path, folder: Path) -> dict[str, Any]:
    """Train every run of RUNS on both devices. Return {name: {device: its metrics}}."""
    found: dict[str, Any] = {}
    plots = (mock.patch.object(training_run, f"plot_{name}", _draw_nothing) for name in ("architecture", "pruning"))
    with contextlib.ExitStack() as stack:
        for each in plots:
            stack.enter_context(each)
        for name, more in RUNS.items():
            found[name] = {}
            arguments = command(source, corpus, folder, *SHARED, *more.split())
            for device in ("cpu", "cuda"):
                output = folder / f"{name}-{device}"
                on_device = [*arguments, "--output", str(output), "--device", device]
                if device == "cuda":
                    with fake_cuda(), mock.patch.object(Trainer, "_step", _stopping(Trainer._step)):
                        assert run(on_device) == 130, name
                    on_device.append("--resume")
                with fake_cuda() if device == "cuda" else contextlib.nullcontext() as counted:
                    assert run(on_device) == 0, name
                found[name][device] = metrics(output)
                if counted is not None:
                    found[name]["waits"] = list(counted.syncs)
    return found


def _draw_nothing(*arguments: Any) -> None:
    """Write an empty file instead of a plot, which is its last argument."""
    Path(arguments[-1]).touch()


def _stopping(real: Any) -> Any:
    def step(trainer: Trainer) -> dict[str, Any]:
        record = real(trainer)
        if record["step"] == STOP_AT:
            trainer.stop_signal.name = "SIGTERM"
        return record

    return step


def error_of_two_devices() -> str:
    """Return the error of an operation on tensors of two devices."""
    with fake_cuda():
        try:
            torch.zeros(0).lerp_(torch.ones(0, device="cuda"), 0.5)
        except RuntimeError as error:
            return str(error)
    return "none"


def main() -> None:
    """Print the findings on a source, a corpus and an output folder as JSON."""
    print(json.dumps({"runs": runs(*map(Path, sys.argv[1:])), "mixed": error_of_two_devices()}))


if __name__ == "__main__":
    main()
