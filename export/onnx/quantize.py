"""Storage of weights in a graph: whole heads of 16 channels, symmetric blocks of 32 inputs (MatMulNBits)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...runtime.base.quantities import round_up, unknown_name
from ...train.model.rotary import HeadPlaces, rotary_places
from ..checkpoint import Checkpoint
from ..group_quantization import quantize_groups

BLOCK = 32
"""Inputs that share a scale."""
HEAD_MULTIPLE = 16
"""GroupQueryAttention rotates heads only in multiples of 16 channels (onnxruntime 1.32)."""


def stored_head_dim(checkpoint: Checkpoint) -> int:
    """Return the channels of a head in the graph: head_dim, zero-padded to HEAD_MULTIPLE."""
    return round_up(checkpoint.architecture.head_dim, HEAD_MULTIPLE)


def head_places(checkpoint: Checkpoint, layer: int, part: str) -> HeadPlaces:
    """Return the places in the graph of the head channels of a layer's q, k, v or o (`part`)."""
    head_dim, width = checkpoint.architecture.head_dim, stored_head_dim(checkpoint)
    return rotary_places(head_dim, checkpoint.attention[layer].rotary_dim if part in "qk" else 0, width)


@dataclass(frozen=True)
class Bits:
    """Bits per weight of each part of the model; 32 is fp32, 16 is fp16 with fp16 activations and caches."""

    attention: int
    gate_up: int
    down: int
    head: int
    """LM head and token embedding."""
    dynamic: bool = False
    """Whether 8-bit matrices have one scale per output and multiply dynamically quantised activations (MatMulInteger).
    """


PRESETS = {
    "f32": Bits(32, 32, 32, 32),
    "f16": Bits(16, 16, 16, 16),
    "int8": Bits(8, 8, 8, 8),
    "mixed": Bits(8, 4, 8, 8),
    "int4": Bits(4, 4, 4, 4),
    # onnxruntime-web unpacks MatMulNBits' weights anew for every token; the inputs of the down projection have outliers
    # that one scale per tensor cannot hold
    "web": Bits(8, 8, 32, 8, dynamic=True),
}
"""`--quantize` values of `--target onnx`; int8 is the safe choice, web the one for browsers."""


def preset(name: str) -> Bits:
    if name not in PRESETS:
        raise unknown_name("--quantize", name, PRESETS, of=" for onnx")
    return PRESETS[name]


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [rows, columns] in the graph."""

    data: Any
    """uint8 [rows, blocks, BLOCK * bits / 8]"""
    scales: Any
    """fp32 [rows, blocks]"""
    rows: int
    columns: int
    bits: int

    @property
    def blocks(self) -> int:
        return -(-self.columns // BLOCK)


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix [rows, columns] in the graph in the layout of MatMulInteger."""

    codes: Any
    """int8 [columns, rows]"""
    scales: Any
    """fp32 [rows]"""


def quantize_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (int8 [rows, columns], fp32 scales [rows]) of fp32 [rows, columns], with one scale per row."""
    codes, scales = quantize_groups(weight, 8, weight.shape[1])
    return codes, scales[:, 0]


def quantize_matrix(weight: np.ndarray, bits: int, gram: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return (uint8 [rows, blocks, BLOCK * bits / 8], fp32 scales [rows, blocks]) of fp32 [rows, columns].

    Columns are padded to whole blocks with zeros. `gram` is that of `quantize_groups`.
    """
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    extra = blocks * BLOCK - columns
    if extra:
        weight = np.pad(weight, ((0, 0), (0, extra)))
        gram = None if gram is None else np.pad(gram, (0, extra))
    codes, scales = quantize_groups(weight, bits, BLOCK, gram, signed=True)
    data = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)  # the zero point that the kernels imply
    if bits == 4:  # two to a byte, the even column in the lower half
        data = data[:, ::2] | (data[:, 1::2] << 4)
    return data.reshape(rows, blocks, BLOCK * bits // 8), scales
