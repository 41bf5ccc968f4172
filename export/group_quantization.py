"""Round matrices to few bits with one symmetric scale per group of inputs.

This is the storage of onnxruntime's MatMulNBits and XNNPACK's blockwise kernels: weight[n, k] = codes[n, k] * scales[n,
k // group] with codes from -2^(bits-1) to 2^(bits-1) - 1. N outputs, K inputs, G = K / group. The code is our own, so
that one rounding serves both targets and needs no executable graph. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SHARES = np.linspace(1.0, 0.7, 7, dtype=np.float32)
"""Tried scales, as shares of the one that reaches the largest weight. Clipping that weight makes all others finer."""

SIGNED_SHARES = [*np.linspace(1.0, 0.82, 4, dtype=np.float32).tolist(), 1.06, 1.12]
"""The same for scales that may be negative, so that the largest weight can have the lowest code. There is one more code
below zero than above."""

SEARCHED_BITS = 4
"""Largest number of bits with a scale search; above, clipping gains nothing."""

DAMPING = 0.01
"""Share of the mean diagonal added to the Gram matrix, as in the GPTQ paper."""

SHRINKAGE = 0.5
"""Share of the off-diagonal moments that is dropped. They are noisy, and later layers see the inputs of an already
rounded model. On SmolLM2-135M, held-out KL is 0.17 with 0.3 to 0.7, 0.22 without, 0.36 without calibration
(research/log)."""

SMALLEST = 1e-10
"""Scale of a group of zeros."""

Rounding = Callable[[np.ndarray], np.ndarray]


def round_to_bfloat16(scales: np.ndarray) -> np.ndarray:
    """Round fp32 values to the nearest bfloat16, ties to even."""
    bits = scales.astype(np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded & 0xFFFF0000).astype(np.uint32).view(np.float32)


def keep_scale(scales: np.ndarray) -> np.ndarray:
    return scales


def search_scales(
    groups: np.ndarray,
    bits: int,
    importance: np.ndarray | None = None,
    rounding: Rounding = keep_scale,
    signed: bool = False,
) -> np.ndarray:
    """Return scales fp32 [..., 1] of `groups` [..., group] with the least squared rounding error.

    `importance` [..., group], broadcast, weights the squares. `rounding` is applied to every candidate. `signed`
    allows negative scales.
    """
    lowest_code, highest_code = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if signed:
        largest = np.abs(groups).argmax(-1)[..., None]
        full, shares = np.take_along_axis(groups, largest, -1) / lowest_code, SIGNED_SHARES
    else:
        full, shares = np.abs(groups).max(-1, keepdims=True) / highest_code, list(SHARES)
    full = np.where(np.abs(full) < SMALLEST, np.float32(SMALLEST), full)
    best_scale, best_error = rounding(full), np.full_like(full, np.inf)
    for share in shares if bits <= SEARCHED_BITS else []:
        # rounded before the errors are compared: the file stores this scale
        scale = rounding(full * np.float32(share))
        difference = _round(groups, scale, bits) * scale - groups
        squares = difference * difference
        if importance is not None:
            squares = squares * importance
        error = squares.sum(-1, keepdims=True)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
    return best_scale


def quantize_groups(
    weight: np.ndarray,
    bits: int,
    group: int,
    gram: np.ndarray | None = None,
    rounding: Rounding = keep_scale,
    signed: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes int8 [N, K], scales fp32 [N, G]) of fp32 [N, K]. K must be a multiple of `group`.

    With the second moments X^T X / n [K, K] of the layer's inputs, scales minimise the error of the products, and
    rounding errors are carried into the inputs not yet rounded, most active first (GPTQ, arXiv 2210.17323, act-order).
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // group, group)
    if gram is None:
        scales = search_scales(groups, bits, None, rounding, signed)
        codes = _round(groups, scales, bits).reshape(rows, columns)
    else:
        importance = np.maximum(np.diag(gram), 1e-12).reshape(columns // group, group)
        scales = search_scales(groups, bits, importance, rounding, signed)
        scale_of_each = np.repeat(scales[..., 0], group, axis=1)
        codes = _round_compensated(weight, scale_of_each, bits, gram)
    return codes.astype(np.int8), scales[..., 0]


def _round(values: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    half = 2 ** (bits - 1)
    return np.clip(np.rint(values / scales), -half, half - 1)


BLOCK = 32
"""Inputs rounded before the others are updated: one matrix product instead of as many rank-one updates."""


def _round_compensated(weight: np.ndarray, scales: np.ndarray, bits: int, gram: np.ndarray) -> np.ndarray:
    """Return codes [N, K] of `weight` for given scales [N, K]."""
    columns = weight.shape[1]
    diagonal = np.diag(gram).astype(np.float64)
    order = np.argsort(-diagonal)
    hessian = (1 - SHRINKAGE) * gram[order][:, order].astype(np.float64)
    # the damping also covers inputs that are never active
    damping = DAMPING * max(float(diagonal.mean()), 1e-12)
    hessian[np.diag_indices(columns)] = diagonal[order] + damping
    # inverse = upper^T upper; row i of `upper` spreads the error of input i over the inputs after it
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)
    work, scales = weight[:, order], scales[:, order]
    codes = np.empty_like(work)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        block = work[:, begin:end]  # a view: what follows changes `work`
        errors = np.empty_like(block)
        for column in range(begin, end):
            local, scale = column - begin, scales[:, column]
            codes[:, column] = _round(block[:, local], scale, bits)
            rounding_error = block[:, local] - codes[:, column] * scale
            error = rounding_error / upper[column, column]
            block[:, local + 1 :] -= np.outer(error, upper[column, column + 1 : end])
            errors[:, local] = error
        work[:, end:] -= errors @ upper[begin:end, end:]
    result = np.empty_like(codes)
    result[:, order] = codes
    return result
