"""Encode and decode Q2_0 blocks: 64 weights, each -1, 0, 1 or 2 times one fp16 scale that may be negative.

llama.cpp's quantiser (ggml-quants.c, quantize_row_q2_0_ref, of llama-cpp-python 0.3.36) uses the largest weight as the
scale and never gives 2, which loses half of the squared weights. Its reader accepts any scale. Blocks are rows of [N,
64] here. Imports no torch.
"""

from __future__ import annotations

import numpy as np

BLOCK = 64
BLOCK_BYTES = 18
TENSOR_TYPE = 42
"""GGML_TYPE_Q2_0"""

OF_LARGEST = (1.0, 0.5)
"""Tried scales, in largest weights. One of them is the scale of an already rounded block, with error 0."""

OF_RMS = (0.85, 0.95, 1.05, 1.15, 1.3)
"""Tried scales, in root mean squares."""

ROWS = 16_384
"""Blocks that are rounded at once."""


def encode(weight: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Encode fp32 [rows, columns] with whole blocks as uint8 [rows, bytes] by the least squared error.

    `importance` fp32 [columns] weights the squares.
    """
    rows, columns = weight.shape
    blocks = np.ascontiguousarray(weight, np.float32).reshape(-1, BLOCK)
    weights = None
    if importance is not None:
        of_row = np.maximum(importance, 1e-12).reshape(-1, BLOCK).astype(np.float32)
        weights = np.broadcast_to(of_row, (rows, *of_row.shape)).reshape(-1, BLOCK)
    data = np.empty((len(blocks), BLOCK_BYTES), np.uint8)
    for start in range(0, len(blocks), ROWS):
        piece = slice(start, start + ROWS)
        data[piece] = _encode_blocks(blocks[piece], None if weights is None else weights[piece])
    return data.reshape(rows, columns // BLOCK * BLOCK_BYTES)


def decode(data: np.ndarray) -> np.ndarray:
    """Decode uint8 [rows, bytes] to fp32 [rows, columns], as llama.cpp reads it."""
    blocks = data.reshape(-1, BLOCK_BYTES)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    codes = (blocks[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3
    multiples = codes.reshape(-1, BLOCK).astype(np.float32) - 1
    return (multiples * scales).reshape(len(data), -1)


def _encode_blocks(blocks: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    rms = np.sqrt((blocks * blocks).mean(1, keepdims=True))
    rms = np.copysign(rms, largest)
    candidates = [share * largest for share in OF_LARGEST] + [share * rms for share in OF_RMS]
    best_scale, best_error = np.zeros_like(largest), np.full_like(largest, np.inf)
    for candidate in candidates:
        for sign in (1, -1):  # only one side of zero has a code of two scales
            scale = (sign * candidate).astype(np.float16).astype(np.float32)
            difference = _codes(blocks, scale) * scale - blocks
            squares = difference * difference
            if importance is not None:
                squares = squares * importance
            error = squares.sum(1, keepdims=True)
            is_better = error < best_error
            best_error = np.where(is_better, error, best_error)
            best_scale = np.where(is_better, scale, best_scale)
    codes = (_codes(blocks, best_scale) + 1).astype(np.uint8)
    by_byte = codes.reshape(len(blocks), -1, 4)
    shifted = by_byte << np.arange(0, 8, 2, dtype=np.uint8)
    packed = np.bitwise_or.reduce(shifted, axis=-1)
    return np.concatenate([best_scale.astype(np.float16).view(np.uint8), packed], axis=1)


def _codes(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.clip(np.rint(blocks * inverse), -1, 2)
