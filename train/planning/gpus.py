"""Plan a run on GPUs from shapes and data sheets: the settings that fit, memory, time, and the command.

Nothing here is measured. The bound adds the least time of the products at the card's peak and of the memory traffic of
weights, gradients, moments and the loss at its bandwidth. Transfers between ranks overlap with both. Norms, attention
kernels and waits are left out, so a real step is slower.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ...runtime.base import flags
from ...runtime.base.errors import UsageError
from ...runtime.base.quantities import display_name, format_bytes, format_count, markdown_table
from ..compute.hardware import PEAK_FLOPS
from ..compute.loss import chunk_tokens
from ..config.presets import long_run
from ..config.sections import TrainConfig
from ..memory import MemoryEstimate, estimate_memory
from ..model.architecture import Architecture, matmul_parameters
from ..reporting.model_card import command_line


@dataclass(frozen=True)
class Card:
    """Published figures of a GPU."""

    flops: float
    """Dense bf16 FLOP/s."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second to another GPU of the machine, one way: NVLink, or PCIe 4.0 x16."""


CARDS = {
    "h100": Card(PEAK_FLOPS["H100"], 80e9, 3.35e12, 450e9),
    "a100": Card(PEAK_FLOPS["A100"], 80e9, 2.04e12, 300e9),
    "4090": Card(PEAK_FLOPS["4090"], 24e9, 1.008e12, 32e9),
    "l4": Card(PEAK_FLOPS["L4"], 24e9, 0.3e12, 32e9),
}
"""`--gpu` value -> NVIDIA's data sheet of the H100 SXM, A100 SXM 80 GB, GeForce RTX 4090 and L4."""

GPUS_OF_A_NODE = 8
GPU_UTILISATION = 0.4
"""Share of its peak that a GPU reaches in training; 0.3 to 0.5 is common for dense models."""
SEQUENCE_LENGTH = 2048
STEP_TOKENS, FEWEST_STEPS = 2**19, 1000
"""Tokens of a step, unless the run would have fewer steps."""
BATCH_SIZES = (8, 4, 2, 1)
COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of GPUs that are tried if the requested number does not fit."""


@dataclass(frozen=True)
class GpuPlan:
    """A run on GPUs."""

    config: TrainConfig
    memory: MemoryEstimate
    """Bytes of a rank."""
    seconds: dict[str, float]
    """{part of a step: its least seconds}; "links" overlap with the others."""
    step_tokens: int
    """Tokens of all ranks in a step."""

    @property
    def tokens_per_second(self) -> float:
        """Return the upper bound over all ranks."""
        local = sum(seconds for part, seconds in self.seconds.items() if part != "links")
        return self.step_tokens / max(local, self.seconds["links"])

    @property
    def expected_tokens_per_second(self) -> float:
        """Return the rate at GPU_UTILISATION of the peak, or the bound if it is lower."""
        return min(self.tokens_per_second, GPU_UTILISATION * self.step_tokens / self.seconds["products"])


def plan_gpus(source: str, shape: Architecture, gpu: str, gpus: int, tokens: int, ratio: float) -> GpuPlan:
    """Return the fastest plan that fits, with fp32 moments if they fit. Raises UsageError if none fits."""
    plans = list(_plans(source, shape, gpu, gpus, tokens, ratio))
    if best := _best(plans, gpu):
        return best
    least = format_bytes(min(plan.memory.peak for plan in plans))
    fitting = []
    for name in CARDS:
        counts = (count for count in COUNTS if _best(_plans(source, shape, name, count, tokens, ratio), name))
        fitting += [f"{count} x {name}" for count in itertools.islice(counts, 1)]
    raise UsageError(
        f"--gpu {gpu} --gpus {gpus}: a rank of {display_name(source)} takes at least {least} of "
        f"{format_bytes(CARDS[gpu].memory)} (derived); it fits on {' or '.join(fitting) or 'none of the known GPUs'}"
    )


def _best(plans: Iterable[GpuPlan], gpu: str) -> GpuPlan | None:
    """Return the fastest plan within the memory of a GPU, with fp32 moments if they fit; None if none fits."""
    found = [plan for plan in plans if plan.memory.peak <= CARDS[gpu].memory]
    in_fp32 = [plan for plan in found if plan.config.optimizer.optimizer_dtype == "float32"]
    return max(in_fp32 or found, key=lambda plan: plan.tokens_per_second, default=None)


def _plans(source: str, shape: Architecture, gpu: str, gpus: int, tokens: int, ratio: float) -> Iterator[GpuPlan]:
    for config in _candidates(source, gpus, tokens, ratio):
        shards, optimizer = _shards(config, gpus), config.optimizer
        memory = estimate_memory(config, shape, torch.bfloat16, shards, is_on_gpu=True, fuses=True)
        step = optimizer.batch_size * optimizer.gradient_accumulation * SEQUENCE_LENGTH * gpus
        yield GpuPlan(config, memory, _seconds(config, shape, CARDS[gpu], gpus), step)


def _shards(config: TrainConfig, gpus: int) -> int:
    return gpus if config.run.data_parallel == "fsdp" else 1


def _candidates(source: str, gpus: int, tokens: int, ratio: float) -> Iterator[TrainConfig]:
    """Yield the settings of `long_run` with every combination that changes memory."""
    recipe = long_run()
    modes = ("ddp", "fsdp") if gpus > 1 else ("ddp",)
    for mode, recomputes, size, moments in itertools.product(
        modes, (False, True), BATCH_SIZES, ("float32", "bfloat16")
    ):
        microbatch = size * gpus * SEQUENCE_LENGTH
        accumulation = max(1, min(STEP_TOKENS, tokens // FEWEST_STEPS) // microbatch)
        settings = {
            "source": source,
            "data": ("corpus.jsonl",),
            "sequence_length": SEQUENCE_LENGTH,
            "target_ratio": ratio,
            "tokens": tokens,
            "batch_size": size,
            "gradient_accumulation": accumulation,
            "optimizer_dtype": moments,
            "output": "runs/small",
            "data_parallel": mode,
            "activation_checkpointing": recomputes,
            "resume_or_start": True,
        }
        yield flags.merge(recipe, settings, "plan")


def _seconds(config: TrainConfig, shape: Architecture, card: Card, gpus: int) -> dict[str, float]:
    """Return the least seconds of the parts of a step of one rank, as the mean over the run."""
    settings, pruning = config.optimizer, config.pruning
    removed_after = (pruning.prune_start + pruning.prune_end) / 2  # the mean over removals
    share = removed_after + (1 - removed_after) * (pruning.target_ratio or 1.0)  # of the parameters, over the tokens
    size = shape.num_parameters * share
    whole = matmul_parameters(shape, shape.num_parameters)
    microbatches = settings.gradient_accumulation
    tokens = settings.batch_size * SEQUENCE_LENGTH  # of a microbatch
    queries = sum(layer.num_attention_heads for layer in shape.layers) * shape.head_dim
    scores = 2 * SEQUENCE_LENGTH * queries  # of a token, half of the pairs: Q K^T and its product with V
    recomputed = config.run.activation_checkpointing
    # The backward pass costs two forward passes, recomputation one more. The teacher has the source's size, and only
    # runs forward.
    of_teacher = 2 * whole + scores
    of_model = (3 + recomputed) * (2 * whole * share + scores * share)
    products = of_model + of_teacher
    head = shape.vocab_size * shape.hidden_size
    chunks = -(-tokens // chunk_tokens(True, shape.vocab_size))
    logits = 7 * 2 * tokens * shape.vocab_size  # bf16: passes of the fused loss over the model's and the teacher's
    moments = 16 if settings.optimizer_dtype == "float32" else 8
    shards = _shards(config, gpus)
    # bf16 copies of fp32 weights, or of bf16 weights that FSDP has gathered twice, and gradients that are added in fp32
    copied = 2 * 4 if shards > 1 else (1 + recomputed) * 6
    weights = (copied + 12) * size
    # FSDP gathers bf16 weights for both passes of each microbatch, and scatters fp32 gradients. DDP reduces fp32
    # gradients once per step, which sends them twice.
    sent_per_weight = (2 * 2 + 4) * microbatches if shards > 1 else 2 * 4
    sent = sent_per_weight * size * (gpus - 1) / gpus
    return {
        "products": microbatches * tokens * products / card.flops,
        "loss": microbatches * (logits + 8 * head * chunks) / card.bandwidth,
        "weights": microbatches * weights / card.bandwidth,
        "optimizer": (12 + moments) * size / shards / card.bandwidth,
        "links": sent / card.link,
    }


def report(source: str, shape: Architecture, gpu: str, gpus: int, plan: GpuPlan) -> str:
    """Return the plan as text. Every figure is labelled."""
    settings, seconds = plan.config.optimizer, plan.seconds
    kept = round(shape.num_parameters * (plan.config.pruning.target_ratio or 1.0))
    local = {part: value for part, value in seconds.items() if part != "links"}
    shares = [f"{part} {value / sum(local.values()):.0%}" for part, value in local.items()]
    if gpus > 1:
        shares.append(f"links beside them {seconds['links'] / sum(local.values()):.0%}")
    hours = [settings.tokens / rate / 3600 for rate in (plan.tokens_per_second, plan.expected_tokens_per_second)]
    memory, total = plan.memory, format_bytes(CARDS[gpu].memory)
    rows = [
        ["figure", "value", "from"],
        ["memory of a rank, peak", f"{format_bytes(memory.peak)} of {total}", "derived"],
        ["weights, gradients, moments", format_bytes(memory.kept), "derived"],
        ["tokens/s, at most", format_count(plan.tokens_per_second), "derived"],
        ["hours, at least", f"{hours[0]:.3g}", "derived"],
        [f"hours at {GPU_UTILISATION:.0%} of the peak", f"{hours[1]:.3g}", "derived"],
        ["GPU hours of that", f"{hours[1] * gpus:.3g}", "derived"],
        ["least time of a step", f"{plan.step_tokens / plan.tokens_per_second:.3g} s: {', '.join(shares)}", "derived"],
    ]
    title = f"{display_name(source)}, {format_count(shape.num_parameters)} to {format_count(kept)} parameters, "
    title += f"{format_count(settings.tokens)} tokens, {gpus} x {gpu}. Nothing was measured."
    return f"{title}\n\n{markdown_table(rows, left=(0, 1, 2))}\n\n{command(plan.config, gpus)}"


def command(config: TrainConfig, gpus: int) -> str:
    """Return the command of a run on this number of GPUs."""
    words = command_line(config)
    if gpus == 1:
        return words
    nodes = -(-gpus // GPUS_OF_A_NODE)
    machines = f"--nnodes {nodes} " if nodes > 1 else ""
    arguments = words.removeprefix("efficientllm-train ")
    return f"torchrun {machines}--nproc-per-node {gpus // nodes} -m efficientllm.train.cli {arguments}"
