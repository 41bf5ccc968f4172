"""The first hour on a GPU, in at most 25 minutes: `python -m research.gpu_hour FOLDER`.

It trains a small model on the CPU and on the GPU and compares losses and removals. It kills a run and resumes it. Then
it times steps of random models of the shapes and settings of both GPU presets, with `--compile` and the fused loss on
and off, and writes a trace of each. FOLDER gets gpu_hour.json and gpu_hour.md. `--device cpu --tiny` does the same with
tiny shapes and without `--compile`, which tests the script.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from efficientllm.train.compute import loss as loss_module
from efficientllm.train.compute.distributed import Parallel
from efficientllm.train.compute.loss import TrainingLoss
from efficientllm.train.compute.optimizer import make_optimizer
from efficientllm.train.compute.stop_signal import StopSignal
from efficientllm.train.compute.trained_model import TrainedModel, configure
from efficientllm.train.config.presets import preset
from efficientllm.train.config.sections import TrainConfig
from efficientllm.train.loop.training_step import TrainingStep
from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.model.irregular import build
from efficientllm.train.pruning.plan import make_pruning_plan
from efficientllm.train.pruning.pruner import Pruner
from efficientllm.train.reporting.metrics import RunProgress, read_metrics

LLAMA_1B = Architecture("llama", 2048, 64, 128_256, True, (LayerShape(32, 8, 8192),) * 16)
SHAPES = {
    "gpu24-1b": LLAMA_1B,
    "node8-8b": Architecture("llama", 4096, 128, 128_256, False, (LayerShape(32, 8, 14_336),) * 4),
}
"""Preset -> Llama-3.2-1B, and Llama-3.1-8B with an eighth of its layers, about as much as one of eight ranks stores."""
TINY = Architecture("llama", 64, 16, 512, True, (LayerShape(4, 2, 96),) * 2)
BUDGET_SECONDS = 25 * 60
"""Cases that would start later are left out."""
CASE_SECONDS = 240
"""Longest time of a case, which includes its compilations."""
WARM_UP, TIMED = 2, 5
"""Steps before the timed ones, and timed steps."""
CHECKED = (
    *("--prune", "attention,ffn,stem,blocks", "--target-ratio", "0.6", "--width-multiple", "2", "--removals", "3"),
    *("--sequence-length", "32", "--batch-size", "4", "--tokens", "2560", "--eval-tokens", "256", "--no-quality"),
    *("--block-tokens", "256", "--held-out-fraction", "0.2", "--dtype", "float32", "--checkpoint-every", "5"),
)
"""Settings of the compared runs: 20 steps of 128 tokens."""


class RandomStream:
    """Random windows of a vocabulary, as much of a PackedStream as a step needs."""

    def __init__(self, vocab_size: int, sequence_length: int) -> None:
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self._random = np.random.default_rng(0)

    def next_windows(self, count: int) -> np.ndarray:
        return self._random.integers(0, self.vocab_size, (count, self.sequence_length + 1))

    def state(self) -> list[Any]:
        return []


def random_model(shape: Architecture, device: torch.device) -> Any:
    """Return a model of a shape with transformers' initial weights."""
    config = AutoConfig.for_model(
        shape.family,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        head_dim=shape.head_dim,
        num_hidden_layers=len(shape.layers),
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    with device:
        return build(config, shape)


def make_step(config: TrainConfig, model: Any, shape: Architecture, teacher: Any, device: torch.device) -> TrainingStep:
    """Return the steps of a run with these settings, from `model` of this shape, on random text."""
    parallel = Parallel(config.run.data_parallel, device, config.run.offload, config.run.reduce_once)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loss = TrainingLoss(model.to(parallel.device), dtype, teacher=teacher)
    optimizer, run = config.optimizer, config.run
    trained = TrainedModel(
        loss,
        parallel,
        partial(
            configure,
            device=parallel.device,
            activation_checkpointing=run.activation_checkpointing,
            compiles=run.compile,
            stores_gradients_as_computed=False,
        ),
        partial(
            make_optimizer,
            learning_rate=1e-4,
            betas=(0.9, 0.95),
            weight_decay=0.01,
            moments=getattr(torch, optimizer.optimizer_dtype),
        ),
    )
    pruner = None
    plan = make_pruning_plan(config.pruning, shape, 0, None)
    if plan is not None:
        pruner = Pruner(plan, trained.model, parallel, 0)
    stream: Any = RandomStream(shape.vocab_size, config.source.sequence_length)
    return TrainingStep(trained, stream, RunProgress(), optimizer, pruner, StopSignal(None))


def time_case(
    name: str, compiles: bool, fuses: bool, is_tiny: bool, device: torch.device, trace: Path
) -> dict[str, Any]:
    """Time steps of a preset and write a trace of one. Two microbatches make a step, as more take only longer."""
    config, shape = preset(name), TINY if is_tiny else SHAPES[name]
    if is_tiny:
        source = replace(config.source, sequence_length=32)
        pruning = replace(config.pruning, target_ratio=0.7)
        config = replace(config, source=source, pruning=pruning)
    optimizer = replace(config.optimizer, gradient_accumulation=2)
    config = replace(config, optimizer=optimizer, run=replace(config.run, compile=compiles))
    loss_module.fuses_on_gpu = fuses
    teacher = random_model(shape, device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    step = make_step(config, random_model(shape, device), shape, teacher.eval().requires_grad_(False), device)
    seconds, record, is_cuda = [], {"loss": None}, device.type == "cuda"
    for _ in range(WARM_UP + TIMED):
        start = time.perf_counter()
        record, _ = step.run(contextlib.nullcontext())
        seconds.append(time.perf_counter() - start)  # the record's loss is read from the device, so its work is done
    with torch.profiler.profile() as profile:
        step.run(contextlib.nullcontext())
    profile.export_chrome_trace(str(trace))
    key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    median = statistics.median(seconds[WARM_UP:])
    return {
        "preset": name,
        "compile": compiles,
        "fused_loss": fuses,
        "first_step_seconds": round(seconds[0], 2),
        "step_seconds": [round(each, 4) for each in seconds[WARM_UP:]],
        "tokens_per_second": round(step.tokens / median),
        "loss": record["loss"],
        "peak_bytes": torch.cuda.max_memory_allocated(device) if is_cuda else None,
        "longest": profile.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=60),
    }


def train(folder: Path, source: str, data: str, device: str, *more: str, kill_at: int | None = None) -> int:
    """Run efficientllm-train with the settings CHECKED, and kill it after step `kill_at`. Return its exit status."""
    command = [sys.executable, "-m", "efficientllm.runtime.start", "train", "--source", source, "--data", data]
    command += ["--output", str(folder), "--device", device, *CHECKED, *more]
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while kill_at is not None and process.poll() is None:
            if (folder / "checkpoints" / f"step-{kill_at:08d}").is_dir():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        return process.wait(CASE_SECONDS)


def compare(folder: Path, source: str, data: str, device: str) -> dict[str, Any]:
    """Train a tiny model on the CPU and on the device, and once more with a kill and a resume."""
    names = {"cpu": "cpu", "device": device, "killed": device}
    codes = [train(folder / name, source, data, names[name]) for name in ("cpu", "device")]
    codes.append(train(folder / "killed", source, data, device, kill_at=10))
    codes.append(train(folder / "killed", source, data, device, "--resume"))
    cpu, gpu, resumed = (read_metrics(folder / name) for name in names)
    losses = [[record["loss"] for record in records if "loss" in record] for records in (cpu, gpu, resumed)]
    removed = [[record.get("removed") for record in records] for records in (cpu, gpu, resumed)]
    return {
        "exit_codes": codes,
        "steps": [len(each) for each in losses],
        "events": sum(each is not None for each in removed[1]),
        "removals_equal": removed[0] == removed[1],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses[0], losses[1], strict=True)),
        "killed_with": codes[2],
        "resumed_identically": removed[1:2] == removed[2:] and losses[1] == losses[2],
    }


def run_case(arguments: list[str], seconds: float) -> dict[str, Any]:
    """Return the result of a case in a process of its own, which frees its memory, or the end of its error."""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
    command = [sys.executable, "-m", "research.gpu_hour", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {seconds:.0f} s"}
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-1500:]}


def page(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    machine, check = report["machine"], report["correctness"]
    lines = [
        "# The first hour on a GPU", "", ", ".join(f"{name}: {value}" for name, value in machine.items()), "",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in check.items()), "",
        "| preset | compiled | fused loss | tokens/s | seconds a step, median (range) | first step, s | peak memory |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for case in report["cases"]:
        title = f"| {case['preset']} | {case['compile']} | {case['fused_loss']} |"
        if "error" in case:
            lines.append(f"{title} {case['error'].splitlines()[-1]} | | | |")
            continue
        seconds = case["step_seconds"]
        shown = f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"
        peak = f"{case['peak_bytes'] / 1e9:.1f} GB" if case["peak_bytes"] else "not measured"
        lines.append(f"{title} {case['tokens_per_second']} | {shown} | {case['first_step_seconds']} | {peak} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every part within the budget of time, and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--source", default="demo", help="model for the comparison with the CPU")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        name, compiles, fuses = options.case[0], options.case[1] == "True", options.case[2] == "True"
        trace = options.folder / f"trace-{'-'.join(options.case)}.json"
        print(json.dumps(time_case(name, compiles, fuses, options.tiny, torch.device(options.device), trace)))
        return
    start, folder = time.monotonic(), options.folder
    folder.mkdir(parents=True)
    is_cuda = options.device.startswith("cuda")
    report: dict[str, Any] = {
        "machine": {
            "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine(),
            "memory_bytes": torch.cuda.mem_get_info()[1] if is_cuda else None,
            "torch": torch.__version__,
            "tiny": options.tiny,
        },
        "correctness": compare(folder, options.source, options.data, options.device),
        "cases": [],
    }
    # the presets' own settings first, and compiled ones last because they take longest
    switches = ((False, True), (True, False)) if not options.tiny else ((False,), (True,))
    for compiles, fuses, name in itertools.product(*switches, SHAPES):
        left = BUDGET_SECONDS - (time.monotonic() - start)
        case = [name, str(compiles), str(fuses)]
        rest = ["--device", options.device, "--source", options.source, *(["--tiny"] if options.tiny else [])]
        result = {"error": "no time was left"}
        if left > 0:
            result = run_case([str(folder), *rest, "--case", *case], min(left, CASE_SECONDS))
        report["cases"].append({"preset": name, "compile": compiles, "fused_loss": fuses, **result})
        (folder / "gpu_hour.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (folder / "gpu_hour.md").write_text(page(report), encoding="utf-8")
    print(page(report))


if __name__ == "__main__":
    main()
