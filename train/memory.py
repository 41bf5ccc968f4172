"""Estimate the peak memory of a run from its shape, and read the memory of the machine.

The peak is at one of two moments of a step at the source's size: the end of the forward pass (weights, moments,
activations, bf16 copies of the weights, the head's gradient) or of the backward pass (weights, moments, gradients).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..runtime.base.errors import UsageError
from ..runtime.base.quantities import format_bytes
from .compute.loss import chunk_tokens, fuses_on_gpu
from .config.sections import TrainConfig
from .model.architecture import Architecture, LayerShape

PROCESS_BYTES = 500_000_000
"""Python, torch and transformers before anything is loaded."""

FRAGMENTS = 0.09
"""Fragmentation of the heap as a share of the peak in use: measured, see docs/method.md, "Memory"."""

CONTROL_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Memory limits of a Linux container, by version of control groups."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process."""

    weights: int
    gradients: int
    moments: int
    """AdamW's two moments."""
    rest: int
    """Everything else at the peak: activations, copies, a teacher, Gram matrices, the process, fragmentation."""

    @property
    def kept(self) -> int:
        """Return the bytes of weights, gradients and moments."""
        return self.weights + self.gradients + self.moments

    @property
    def peak(self) -> int:
        return self.kept + self.rest

    def describe(self) -> str:
        parts = (f"{name} {format_bytes(getattr(self, name))}" for name in ("weights", "gradients", "moments"))
        return f"about {format_bytes(self.peak)} at the peak: {', '.join(parts)}, the rest {format_bytes(self.rest)}"


def estimate_memory(
    config: TrainConfig,
    architecture: Architecture,
    products: torch.dtype,
    shards: int = 1,
    keeps_products: bool = False,
    is_on_gpu: bool = False,
    fuses: bool = fuses_on_gpu,
) -> MemoryEstimate:
    """Estimate the memory of a model of this shape.

    `products` is the type of matrix products, `shards` the ranks that share weights, gradients and moments.
    `keeps_products` stores the layers' gradients in that type. `fuses` says whether a GPU computes the loss in fused
    kernels.
    """
    size, settings = architecture.num_parameters, config.optimizer
    is_bf16 = products == torch.bfloat16
    matrices = size - architecture.embedding_parameters  # and norms, which are few
    embedding = 4 * architecture.vocab_size * architecture.hidden_size
    gradients = 4 * size - (2 * matrices if is_bf16 and keeps_products else 0)
    moments = 2 * size * (2 if settings.optimizer_dtype == "bfloat16" else 4)
    # the head's gradient, its bf16 copy, and a chunk of logits, of the source's too
    tokens = settings.batch_size * config.source.sequence_length
    logits = min(tokens, chunk_tokens(is_on_gpu, architecture.vocab_size)) * architecture.vocab_size
    of_logit = 2 if is_bf16 else 4
    of_logit += 8 if is_on_gpu and not fuses else 0  # a log-probability and a temporary, in fp32
    head = embedding + logits * of_logit * (2 if settings.distill else 1)
    head += embedding // 2 if is_bf16 else 0
    forward = head + _kept_for_backward(config, architecture, tokens, is_bf16, shards > 1)
    backward = gradients // shards
    if settings.gradient_accumulation > 1:  # those of the earlier microbatches
        backward = gradients if config.run.reduce_once else backward
        forward += backward
    if architecture.tie_word_embeddings or "stem" in config.pruning.prune:
        backward += embedding  # the embedding's gradient, before it is added to the head's, or scored
    if shards > 1:
        gathered = gathered_bytes(architecture, is_bf16)
        forward += gathered
        backward += gathered + 4 * architecture.embedding_parameters
    rest = PROCESS_BYTES + max(forward, backward) - gradients // shards
    if settings.distill or config.pruning.recover != "none":  # a frozen model in the type of products
        frozen = size // shards
        if shards > 1:
            frozen += architecture.embedding_parameters
        rest += (2 if is_bf16 else 4) * frozen
    rest += 4 * size if config.quantisation.is_on else 0  # the rounded weights beside the others
    rest += _gram_bytes(config, architecture) if config.pruning.weight_update == "obs" else 0
    kept = 4 * size // shards, gradients // shards, moments // shards
    return MemoryEstimate(*kept, round(rest + FRAGMENTS * (sum(kept) + rest)))


def gathered_bytes(architecture: Architecture, is_bf16: bool) -> int:
    """Return the bytes of whole weights under FSDP: embedding and head, two layers, and the gradient of one twice.

    Layers and their gradients are in the type of products. The gradient's copy, which ranks add up, is fp32.
    """
    layers = [
        architecture.attention_parameters(each) + architecture.ffn_parameters(each) for each in architecture.layers
    ]
    of_layer = 3 * (2 if is_bf16 else 4) + 4
    return 4 * architecture.embedding_parameters + of_layer * max(layers)


def _kept_for_backward(
    config: TrainConfig, architecture: Architecture, tokens: int, is_bf16: bool, is_sharded: bool = False
) -> int:
    """Return the bytes of activations of `tokens` and bf16 copies of the layers' weights.

    FSDP gathers the weights in bf16 again for the backward pass, so no copies stay.
    """
    activations = [tokens * activation_bytes(architecture, layer, is_bf16) for layer in architecture.layers]
    parameters = [
        architecture.attention_parameters(each) + architecture.ffn_parameters(each) for each in architecture.layers
    ]
    copies = [2 * count if is_bf16 and not is_sharded else 0 for count in parameters]
    if config.run.activation_checkpointing:  # the input of every layer, and all of one
        return 4 * tokens * architecture.hidden_size * len(copies) + max(activations) + max(copies)
    return sum(activations) + sum(copies)


def activation_bytes(architecture: Architecture, layer: LayerShape, is_bf16: bool) -> int:
    """Return the bytes that a layer keeps of a token for its backward pass.

    Norms keep their fp32 input and normalised input (one before each block is counted with the block, one after it
    apart). Products keep their inputs, bf16 ones a copy each. Attention keeps queries, keys, values and its output. The
    FFN keeps gate, its activation, up and their product, or up and its activation without a gate.
    """
    width, hidden, parts = 2 if is_bf16 else 4, architecture.hidden_size, architecture.parts
    behind = 8 * hidden if "after_attention" in parts.norms else 0
    heads = 2 * (layer.num_attention_heads + layer.num_key_value_heads)
    of_attention = (14 if is_bf16 else 12) * hidden + width * heads * architecture.head_dim + behind
    of_ffn = 12 * hidden + width * (4 if parts.is_gated else 2) * layer.intermediate_size + behind
    return (of_attention if heads else 0) + (of_ffn if layer.intermediate_size else 0)


def _gram_bytes(config: TrainConfig, architecture: Architecture) -> int:
    """Return the bytes of the OBS update's matrices, and of the copies that undo an interrupted step."""
    copies = 2 if config.optimizer.gradient_accumulation > 1 else 1
    widest = config.pruning.obs_max_width or architecture.num_parameters
    widths = []
    for layer in architecture.layers:
        widths += [layer.num_attention_heads * architecture.head_dim] if "attention" in config.pruning.prune else []
        widths += [layer.intermediate_size] if "ffn" in config.pruning.prune else []
        widths += [architecture.hidden_size] * 2 if "stem" in config.pruning.prune else []
    return sum(4 * copies * width**2 for width in widths if width <= widest)


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


def check_memory(estimate: MemoryEstimate, memory: Memory, config: TrainConfig) -> str:
    """Return a warning if the peak may not fit, else an empty string. Raises UsageError if it cannot fit."""
    remedies = []
    if config.optimizer.optimizer_dtype != "bfloat16":
        remedies.append("--optimizer-dtype bfloat16")
    if config.optimizer.batch_size > 1 and estimate.kept <= memory.total:
        remedies.append("a smaller --batch-size")
    if not config.run.activation_checkpointing and estimate.kept <= memory.total:
        remedies.append("--activation-checkpointing")
    advice = " or ".join([*remedies, "a smaller --source"])
    if estimate.kept > memory.total:
        raise UsageError(
            f"--source {config.source.source}: training takes {estimate.describe()}; there are "
            f"{format_bytes(memory.total)}: try {advice}"
        )
    if estimate.peak > memory.free:
        return f"{format_bytes(memory.free)} are free now, which may be too little: if it ends there, try {advice}"
    return ""
