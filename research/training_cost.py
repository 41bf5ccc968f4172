"""What pruning costs a training step: `python -m research.training_cost`.

Variants of one step take turns on the same model, so that drift of the machine hits all alike; medians and quartiles
are reported, and each variant's ratio to the plain step. Removal and weight update are timed as single events.

`--processes` lets processes take turns instead: this package's step, the same with waiting threads that sleep, and a
plain loop of transformers, on a quiet machine and beside a program that keeps one core busy.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.quantities import Figure, format_count, markdown_table, unknown_name
from efficientllm.train.compute.hardware import choose_hardware
from efficientllm.train.compute.loss import TrainingLoss
from efficientllm.train.compute.optimizer import clip_factor, gradient_norm, make_optimizer
from efficientllm.train.compute.trained_model import configure
from efficientllm.train.config.sections import QAT_TARGETS, QuantisationConfig
from efficientllm.train.data.documents import DataSpec
from efficientllm.train.data.packing import PackedStream
from efficientllm.train.model.irregular import architecture_of
from efficientllm.train.model.source import load_source
from efficientllm.train.pruning.plan import make_tracker
from efficientllm.train.pruning.recovery import InputGrams
from efficientllm.train.pruning.rules import SelectionRules
from efficientllm.train.pruning.running_scores import RunningScores
from efficientllm.train.pruning.saliency import FOLDS
from efficientllm.train.pruning.selection import select_removal
from efficientllm.train.pruning.surgery import remove_groups
from efficientllm.train.quantisation.weights import RoundedWeights
from efficientllm.train.reporting.metrics import read_metrics

TRAINED_TYPES = tuple(QAT_TARGETS)
"""Of --qat."""

WITHOUT_STEM = tuple(name for name in FOLDS if name != "stem")


@dataclass(frozen=True)
class BenchmarkOptions:
    """Benchmark."""

    source: str = "demo"
    """Model, as --source of efficientllm-train."""
    data: str = "demo"
    """Text, as --data of efficientllm-train."""
    batch_size: int = 4
    """Sequences per step."""
    sequence_length: int = 256
    """Tokens per sequence."""
    rounds: int = 9
    """Timed steps of each variant."""
    steps: tuple[str, ...] = flags.comma_separated("all")
    """Variants to time beside the plain one, comma-separated, as the table calls them; or all."""
    run: str = ""
    """Report the speed through this finished run instead."""
    processes: bool = False
    """Compare processes instead, with and without a busy core."""
    child: str = ""
    """Be one of these processes, which takes a step for every line of its input: ours or transformers."""


class StepBenchmark:
    """One model, one optimizer, and the same kind of step with different extras."""

    def __init__(self, options: BenchmarkOptions) -> None:
        hardware = choose_hardware("auto", "auto", 0)
        batch_size, sequence_length = options.batch_size, options.sequence_length
        print(f"{options.source}, batch {batch_size} x {sequence_length}; {hardware.describe()}")
        self.device = hardware.device
        self.model, tokenizer = load_source(options.source)
        self.model.to(hardware.device).train()
        self.architecture = architecture_of(self.model.config)  # type: ignore[attr-defined]
        self.loss = TrainingLoss(self.model, hardware.dtype)
        self.optimizer = make_optimizer(self.model, 0.0, (0.9, 0.95), 0.01)
        keeps_bf16 = hardware.dtype == torch.bfloat16
        configure(self.model, hardware.device, False, False, stores_gradients_as_computed=keeps_bf16)
        # at a learning rate of 0 the weights stay, so every variant does the same arithmetic
        self.stream = PackedStream([DataSpec.parse(options.data)], tokenizer, sequence_length, 0.05, seed=0)
        self.batch_size = batch_size
        self.tokens = batch_size * sequence_length
        self.grams: InputGrams | None = None

    def tracker(self, criterion: str, kinds: tuple[str, ...]) -> RunningScores:
        return make_tracker(criterion, kinds, self.architecture, 0.9)

    def step(self, tracker: RunningScores | None = None, rounded: RoundedWeights | None = None) -> float:
        """Seconds of one step."""
        windows = torch.from_numpy(self.stream.next_windows(self.batch_size)).to(self.device)
        if tracker is not None:
            tracker.attach(self.model)
        self._wait()
        began = time.perf_counter()
        with rounded.applied(self.model) if rounded is not None else contextlib.nullcontext():
            self.loss(windows)[0].backward()
        if tracker is not None:
            tracker.accumulate(self.model.named_parameters())
            tracker.finish_step()
        self.optimizer.step(gradient_scale=clip_factor(gradient_norm(self.model.parameters()), 1.0))
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        seconds = time.perf_counter() - began
        if tracker is not None:
            tracker.detach()
        return seconds

    def step_with_grams(self, axes: set[str]) -> float:
        """Seconds of one step in which input Gram matrices are collected."""
        if self.grams is None:
            self.grams = InputGrams(self.model, axes, 0.95, 0.01, 0, 512)
        else:
            self.grams.attach(self.model)
        seconds = self.step()
        self.grams.detach()
        return seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def compare_steps(bench: StepBenchmark, rounds: int, wanted: Sequence[str]) -> None:
    """Interleaved steps: plain, with each criterion, with the Gram matrices of the weight update."""
    variants: dict[str, Callable[[], float]] = {
        "plain": bench.step,
        "taylor1": lambda: bench.step(trackers["taylor1"]),
        "taylor1, with stem": lambda: bench.step(trackers["taylor1, with stem"]),
        "taylor2": lambda: bench.step(trackers["taylor2"]),
        "fisher": lambda: bench.step(trackers["fisher"]),
        "token-fisher": lambda: bench.step(trackers["token-fisher"]),
        **{f"qat {each}": lambda each=each: bench.step(rounded=rounded[each]) for each in TRAINED_TYPES},
        "obs Gram matrices": lambda: bench.step_with_grams({"query", "ffn"}),
    }
    trackers = {
        "taylor1": bench.tracker("taylor1", WITHOUT_STEM),
        "taylor1, with stem": bench.tracker("taylor1", tuple(FOLDS)),
        "taylor2": bench.tracker("taylor2", WITHOUT_STEM),
        "fisher": bench.tracker("fisher", WITHOUT_STEM),
        "token-fisher": bench.tracker("token-fisher", WITHOUT_STEM),
    }
    rounded = {each: RoundedWeights(QuantisationConfig(qat=each)) for each in TRAINED_TYPES}  # type: ignore[arg-type]
    if wanted != ("all",):
        unknown = next((name for name in wanted if name not in variants), None)
        if unknown is not None:
            raise unknown_name("--steps", unknown, variants)
        variants = {name: run for name, run in variants.items() if name in ("plain", *wanted)}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            elapsed = run()
            if turn:  # the first round warms up
                seconds[name].append(elapsed)
    plain = statistics.median(seconds["plain"])
    rows = [["step", f"median (quartiles) of {rounds}", "tokens/s", "against plain"]]
    for name, values in seconds.items():
        ratio = statistics.median(v / p for v, p in zip(values, seconds["plain"], strict=True))
        speed = bench.tokens / statistics.median(values)
        rows.append([name, f"{Figure.of(values).describe(3)} s", f"{speed:.0f}", f"{ratio:.3f}"])
    print(f"\n{markdown_table(rows)}")
    gram_bytes = sum(gram.nbytes for gram in bench.grams.grams.values()) if bench.grams else 0
    print(f"\nplain step {plain:.3f} s; Gram matrices hold {gram_bytes / 1e6:.0f} MB")


def time_events(bench: StepBenchmark) -> None:
    """One pruning event of about 1 % of the parameters: selection, weight update, physical removal."""
    tracker = bench.tracker("taylor1", WITHOUT_STEM)
    bench.step(tracker)
    target = round(0.99 * bench.architecture.num_parameters)
    timings: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        timings[name] = time.perf_counter() - began
        return result

    rules = SelectionRules(WITHOUT_STEM, 32)
    removal = timed("selection", lambda: select_removal(bench.architecture, tracker.scores, rules, target))
    grams = bench.grams
    assert grams is not None
    timed("obs weight update", lambda: grams.update_weights(bench.model, removal))
    timed("physical removal", lambda: remove_groups(bench.model, removal, bench.optimizer))
    layers = {part[0] for unit in removal.units for part in unit.parts}
    print(f"\none event of {len(removal.units)} units in {len(layers)} layers (1 % of the parameters):")
    for name, seconds in timings.items():
        print(f"  {name}: {seconds:.3f} s")


def time_tokenization(bench: StepBenchmark) -> None:
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 3.0:
        count += bench.stream.next_windows(16).size
    print(f"\ntokenising and packing: {count / (time.perf_counter() - began):,.0f} tokens/s")


def speed_through_run(folder: Path) -> None:
    """Tokens per second of a finished run, in five bands of its steps."""
    steps = [record for record in read_metrics(folder) if "loss" in record]
    print(f"{folder}: tokens/s as the model shrinks\n")
    rows = [["tokens seen", "parameters", "tokens/s (median)"]]
    tokens_per_step = steps[0]["tokens"]
    size = -(-len(steps) // 5)
    for start in range(0, len(steps), size):
        band = steps[start : start + size]
        speed = tokens_per_step / statistics.median(record["seconds"] for record in band)
        middle = band[len(band) // 2]["parameters"]
        rows.append([f"{band[0]['tokens']:,} to {band[-1]['tokens']:,}", format_count(middle), f"{speed:.0f}"])
    print(markdown_table(rows))


def plain_steps(options: BenchmarkOptions) -> Callable[[], float]:
    """Return a step of a plain loop of transformers on the same text, which returns its seconds."""
    hardware = choose_hardware("cpu", "auto", 0)
    model, tokenizer = load_source(options.source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    stream = PackedStream([DataSpec.parse(options.data)], tokenizer, options.sequence_length, 0.05, seed=0)
    model.train()

    def step() -> float:
        tokens = torch.from_numpy(stream.next_windows(options.batch_size))[:, :-1]
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=hardware.dtype == torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    return step


def serve_steps(options: BenchmarkOptions) -> None:
    """Take a step for every line of the input, and print its seconds."""
    step = StepBenchmark(options).step if options.child == "ours" else plain_steps(options)
    for _ in sys.stdin:
        print(step(), flush=True)


class StepProcess:
    """A process of `serve_steps`."""

    def __init__(self, child: str, options: BenchmarkOptions, **environment: str) -> None:
        size = ["--batch-size", str(options.batch_size), "--sequence-length", str(options.sequence_length)]
        command = [sys.executable, "-m", "research.training_cost", "--child", child, *size]
        command += ["--source", options.source, "--data", options.data]
        pipe, settings = subprocess.PIPE, {**os.environ, **environment}
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=settings)

    def step(self) -> float:
        """Return the seconds of one step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        while True:
            line = self._process.stdout.readline()
            with contextlib.suppress(ValueError):  # it describes itself first
                return float(line)
            assert line, "a process ended"

    def close(self) -> None:
        self._process.communicate()


def compare_processes(options: BenchmarkOptions) -> None:
    """Print steps/s of processes that take turns, on a quiet machine and beside a program that keeps a core busy."""
    processes = {
        "ours": StepProcess("ours", options),
        "ours, waiting threads sleep": StepProcess("ours", options, OMP_WAIT_POLICY="passive"),
        "transformers": StepProcess("transformers", options),
    }
    rows = [["machine", "process", f"median (quartiles) of {options.rounds}", "rate against ours on a quiet machine"]]
    quiet = 0.0
    for machine in ("quiet", "one busy core"):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if machine != "quiet" else None
        try:
            seconds: dict[str, list[float]] = {name: [] for name in processes}
            for turn in range(options.rounds + 1):
                for name, process in processes.items():
                    elapsed = process.step()
                    if turn:  # the first round warms up
                        seconds[name].append(elapsed)
        finally:
            if busy is not None:
                busy.kill()
        quiet = quiet or statistics.median(seconds["ours"])
        for name, values in seconds.items():
            rate = quiet / statistics.median(values)
            rows.append([machine, name, f"{Figure.of(values).describe(3)} s", f"{rate:.3f}"])
    for process in processes.values():
        process.close()
    print(f"\n{markdown_table(rows, left=(0, 1))}")


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(BenchmarkOptions, prog="python -m research.training_cost", description=__doc__)
    options = flags.take(parser.parse(argv), BenchmarkOptions)
    if options.run:
        speed_through_run(Path(options.run))
        return 0
    if options.child:
        serve_steps(options)
        return 0
    if options.processes:
        compare_processes(options)
        return 0
    bench = StepBenchmark(options)
    compare_steps(bench, options.rounds, options.steps)
    if options.steps == ("all",):
        time_tokenization(bench)
        time_events(bench)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
