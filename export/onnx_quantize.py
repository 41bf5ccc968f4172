"""Block-wise weight quantisation as onnxruntime's MatMulNBits stores it: symmetric, blocks of 32 inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.errors import UsageError


@dataclass(frozen=True)
class Bits:
    """Bits per weight of each part of the model; 32 is fp32."""

    attention: int
    gate_up: int
    down: int
    head: int
    """LM head and token embedding."""


PRESETS = {
    "f32": Bits(32, 32, 32, 32),
    "int8": Bits(8, 8, 8, 8),
    "mixed": Bits(8, 4, 8, 8),
    "int4": Bits(4, 4, 4, 4),
}
"""`--quantize` values of `--target onnx`; int8 is the safe choice."""


def preset(name: str) -> Bits:
    if name not in PRESETS:
        raise UsageError(f"--quantize {name}: unknown for onnx; known: {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [rows, columns] in the graph."""

    data: Any
    """uint8 [rows, blocks, block * bits / 8]"""
    scales: Any
    """fp32 [rows, blocks]"""
    rows: int
    columns: int
    bits: int
    block: int

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.block)


def quantize_matrix(weight: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [rows, blocks, block * bits / 8], fp32 scales [rows, blocks]) of fp32 [rows, columns], round to nearest.

    Columns are padded to whole blocks with zeros. The work is onnxruntime's own.
    """
    from onnxruntime.capi import _pybind_state

    rows, columns = weight.shape
    blocks = -(-columns // block)
    data = np.zeros((rows, blocks, block * bits // 8), dtype=np.uint8)
    scales = np.zeros(rows * blocks, dtype=np.float32)
    zero_points = np.zeros(rows * -(-blocks * bits // 8), dtype=np.uint8)
    quantize = getattr(_pybind_state, f"quantize_matmul_{bits}bits")
    quantize(data, np.ascontiguousarray(weight.T), scales, zero_points, block, rows, columns, True)
    return data, scales.reshape(rows, blocks)
