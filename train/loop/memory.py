"""Count the bytes that a run keeps through every step, and read the memory of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...runtime.base.errors import UsageError
from ...runtime.base.quantities import format_bytes
from ..config.sections import TrainConfig
from ..model.architecture import Architecture

CONTROL_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Memory limits of a Linux container, by version of control groups."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process that do not depend on the length of the text."""

    weights: int
    gradients: int
    moments: int
    """AdamW's two moments."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments

    def describe(self) -> str:
        parts = (f"{name} {format_bytes(getattr(self, name))}" for name in ("weights", "gradients", "moments"))
        return f"{format_bytes(self.total)} ({', '.join(parts)}) and the activations of a batch"


def training_memory(
    config: TrainConfig,
    architecture: Architecture,
    products: torch.dtype,
    shards: int = 1,
    keeps_products: bool = False,
) -> TrainingMemory:
    """Return the memory of a model of this shape.

    `products` is the type of matrix products, `shards` the ranks that share the model. `keeps_products` stores the
    layers' gradients in that type.
    """
    size = architecture.num_parameters
    matrices = size - architecture.embedding_parameters  # and norms, which are few
    gradients = 4 * size - (2 * matrices if products == torch.bfloat16 and keeps_products else 0)
    moments = 2 * size * (2 if config.optimizer.optimizer_dtype == "bfloat16" else 4)
    return TrainingMemory(4 * size // shards, gradients // shards, moments // shards)


@dataclass(frozen=True)
class Memory:
    """Bytes of a device for each of the processes that share it."""

    total: int
    free: int


def device_memory(device: torch.device, processes: int = 1) -> Memory | None:
    """Return the memory of a GPU, or of this machine or container with its swap, or None if unknown."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    total = values["MemTotal"] + values["SwapTotal"]
    free = values["MemAvailable"] + values["SwapFree"]
    # /proc/meminfo shows the memory of the machine also within a container
    for path in CONTROL_GROUP_LIMITS:
        limit = path.read_text(encoding="ascii").strip() if path.is_file() else "max"
        if limit != "max":
            total = min(total, int(limit))
    return Memory(total // processes, min(total, free) // processes)


def check_memory(needed: TrainingMemory, memory: Memory, config: TrainConfig) -> str:
    """Return a warning if the run may not fit, else an empty string. Raises UsageError if it cannot fit."""
    remedies = [] if config.optimizer.optimizer_dtype == "bfloat16" else ["--optimizer-dtype bfloat16"]
    advice = " or ".join([*remedies, "a smaller --source"])
    if needed.total > memory.total:
        raise UsageError(
            f"--source {config.source.source}: training takes {needed.describe()}; there are "
            f"{format_bytes(memory.total)}: try {advice}"
        )
    if needed.total > memory.free:
        return f"{format_bytes(memory.free)} are free now, which is too little: close programs, or try {advice}"
    return ""
