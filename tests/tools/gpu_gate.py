"""Run training on a CUDA device that is not there (`fake_cuda.py`), in a process of its own:

    python -m tests.tools.gpu_gate runs SOURCE CORPUS FOLDER    # every path of a run, against the same run on the CPU
    python -m tests.tools.gpu_gate roofline                     # waits, kernels and least time of a step of a 1B model
    python -m tests.tools.gpu_gate all SOURCE CORPUS FOLDER     # both with few microbatches, and two devices' error

`runs` stops and resumes every run after a few steps. Each prints one line of JSON.
"""

# ruff: noqa: E402  # fake_cuda comes before torch

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from fake_cuda import UNCOUNTED_PHASE, Device, fake_cuda  # isort: skip

import torch
from torch import Tensor
from training import command, metrics, run

from efficientllm.train import run as training_run
from efficientllm.train import training_step
from efficientllm.train.compute import loss as loss_module
from efficientllm.train.compute.optimizer import AdamW
from efficientllm.train.config.pruning import PruneConfig
from efficientllm.train.config.sections import OptimizerConfig, SourceConfig, TrainConfig
from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.trainer import Trainer
from research.gpu_hour import LLAMA_1B, make_step, random_model

RUNS: dict[str, str] = {
    "taylor1": "--prune attention,ffn,stem,blocks --block-tokens 128",
    "taylor2": "--saliency taylor2 --prune attention,ffn,stem --gradient-accumulation 2 --batch-size 2",
    "fisher": "--saliency fisher --prune layers,ffn --block-tokens 128 --gradient-accumulation 2 --batch-size 2",
    "magnitude": "--saliency magnitude --qat q4_0",
    "random": "--saliency random --compact-every 2",
    "flap": "--saliency flap --prune attention,ffn --distill 1 --layout uniform",
    "wanda": "--saliency wanda --prune attention,ffn --weight-update obs",
    "minitron": "--saliency minitron --prune attention,ffn --qat int4-block32",
    "token-fisher": "--saliency token-fisher --recover least-squares --recover-tokens 256 --distill 1 "
    "--prune attention,ffn,vocabulary,blocks --block-tokens 128 --vocabulary-tokens 2000 --activation-checkpointing",
    "rounded": "--saliency token-fisher --prune attention,ffn,vocabulary --vocabulary-rows 384 --distill 1 --qat 8da4w "
    "--vocabulary-tokens 2000 --teacher self --recover least-squares --recover-tokens 256 --dtype bfloat16",
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
    plots = (
        mock.patch.object(training_run, f"plot_{name}", _draw_nothing)
        for name in ("architecture", "training", "pruning")
    )
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
                with fake_cuda() if device == "cuda" else contextlib.nullcontext():
                    assert run(on_device) == 0, name
                found[name][device] = metrics(output)
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


META = torch.device("meta")
SHAPES = {
    "1b": LLAMA_1B,
    "1b-half": Architecture("llama", 2048, 64, 128_256, True, (LayerShape(12, 3, 2560),) * 16),
}
"""Llama-3.2-1B, and half of its layers' parameters."""


STEPS = (
    ("1b", "", 1.0, 4, 1),
    ("1b-half", "token-fisher", 1.0, 4, 1),
    ("1b-half", "taylor1", 0.0, 1, 8),
)
"""Shape, saliency, weight of distillation, sequences of a microbatch, microbatches."""


def step_of(shape: str, saliency: str, distill: float, batch_size: int, accumulation: int) -> dict[str, Any]:
    """Return waits, kernels and least seconds of a training step of a shape on one H100."""
    architecture = SHAPES[shape]
    config = TrainConfig(
        SourceConfig(sequence_length=2048),
        PruneConfig(target_ratio=0.5, saliency=saliency) if saliency else PruneConfig(prune=("none",)),
        OptimizerConfig(tokens=10**9, batch_size=batch_size, gradient_accumulation=accumulation, distill=distill),
    )
    with fake_cuda(has_values=False) as device:
        model, teacher = random_model(architecture, META), None
        if distill:
            teacher = random_model(SHAPES["1b"], META).to("cuda", torch.bfloat16).eval().requires_grad_(False)
        step = make_step(config, model, architecture, teacher, torch.device("cuda"))
        with phases(device):
            step.run(contextlib.nullcontext())  # the first step makes the optimizer's tensors
            device.clear()
            step.run(contextlib.nullcontext())
        seconds = sum(device.seconds.values())
        return {
            "shape": shape, "saliency": saliency, "distill": distill, "microbatches": accumulation,
            "syncs": sum(device.syncs.values()), "lines": dict(device.syncs.most_common()),
            "kernels": device.kernels, "tokens_per_second": round(step.tokens / seconds),
            "shares": {name: round(each / seconds, 3) for name, each in device.seconds.items()},
        }  # fmt: skip


@contextlib.contextmanager
def phases(device: Device) -> Iterator[None]:
    """Attribute the device's time to the loss and the optimizer in this block."""

    def timed(owner: Any, name: str, phase: str) -> Any:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with device.during(phase):
                return real(*arguments, **options)

        return mock.patch.object(owner, name, call)

    def fused(logits: Tensor, targets: Tensor, theirs: Tensor | None, *rest: Any) -> Any:
        with device.during(UNCOUNTED_PHASE):
            found = loss_module._losses_of_rows(logits, targets, theirs, *rest)
        passes = 4 if theirs is None else 7  # the maximum, the sum and the difference of each read it, one writes
        device.kernels += passes
        device.add(passes * logits.numel() * logits.element_size())
        return found

    with (
        mock.patch.object(loss_module, "fuses_on_gpu", True),
        mock.patch.object(loss_module, "_fused_losses_of_rows", return_value=fused),
        timed(loss_module, "cross_entropy", "loss"),
        timed(loss_module._ChunkedLoss, "backward", "loss"),
        timed(AdamW, "step", "optimizer"),
        timed(training_step, "gradient_norm", "optimizer"),
    ):
        yield


def main() -> None:
    """Run the command of the arguments."""
    what, *paths = sys.argv[1:]
    if what == "all":
        few = [(*case[:-1], min(case[-1], 3)) for case in STEPS]
        parts = {"runs": runs(*map(Path, paths)), "roofline": [step_of(*case) for case in few]}
        print(json.dumps({**parts, "mixed": error_of_two_devices()}))
    else:
        print(json.dumps(runs(*map(Path, paths)) if what == "runs" else [step_of(*case) for case in STEPS]))


if __name__ == "__main__":
    main()
