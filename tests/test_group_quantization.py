"""Rounding to few bits with one scale per group."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from efficientllm.export.group_quantization import quantize_groups, round_to_bfloat16


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return codes * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


def test_bfloat16_rounding_equals_torch() -> None:
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(round_to_bfloat16(values), expected)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_keeps_values_on_the_grid(bits: int, signed: bool) -> None:
    random = np.random.default_rng(1)
    high = 2 ** (bits - 1) - 1
    codes = random.integers(-high, high + 1, size=(6, 64))
    codes[:, ::32] = -high - 1 if signed else high  # the largest of each group
    weight = codes * random.uniform(0.1, 2.0, size=(6, 2)).repeat(32, axis=1)
    found, scales = quantize_groups(weight.astype(np.float32), bits, 32, signed=signed)
    np.testing.assert_allclose(dequantize(found, scales), weight, rtol=1e-5)


def test_search_beats_the_scale_of_the_largest_weight() -> None:
    weight = np.random.default_rng(2).normal(size=(64, 256)).astype(np.float32)
    groups = weight.reshape(64, 8, 32)
    plain = np.abs(groups).max(-1, keepdims=True) / 7
    plain_error = ((np.rint(groups / plain) * plain - groups) ** 2).sum()
    errors = [((dequantize(*quantize_groups(weight, 4, 32, signed=s)) - weight) ** 2).sum() for s in (False, True)]
    assert errors[1] < errors[0] < plain_error


def test_compensation_lowers_the_error_of_the_product() -> None:
    random = np.random.default_rng(3)
    weight = random.normal(size=(48, 128)).astype(np.float32)
    inputs = (random.normal(size=(4096, 24)) @ random.normal(size=(24, 128))).astype(np.float32)  # correlated
    inputs[:, 100:] = 0  # padded inputs are never active
    gram = inputs.T @ inputs / len(inputs)

    def error(codes: np.ndarray, scales: np.ndarray) -> float:
        return float(((inputs @ (dequantize(codes, scales) - weight).T) ** 2).mean())

    assert error(*quantize_groups(weight, 4, 32, gram)) < 0.5 * error(*quantize_groups(weight, 4, 32))


def test_zero_groups() -> None:
    codes, scales = quantize_groups(np.zeros((2, 64), np.float32), 4, 32)
    assert not codes.any()
    assert np.isfinite(scales).all()
