"""Rotary embedding: tables from a checkpoint's rope parameters, and its orders of rows. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..runtime.base.errors import ModelError


def frequency_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray | None:
    """What frequencies are divided by, fp32 [head_dim / 2]; None without scaling.

    Llama 3's rule (transformers' `_compute_llama3_parameters`); ModelError for any other.
    """
    kind = rope["rope_type"]
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"rope_type {kind!r} is not supported for export; default and llama3 are")
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelengths = 2 * np.pi / _frequencies(rope, head_dim)
    smooth = (original / wavelengths - low) / (high - low)
    scaled = np.where(
        wavelengths < original / high,
        1.0,
        np.where(wavelengths > original / low, factor, 1.0 / ((1 - smooth) / factor + smooth)),
    )
    return scaled.astype(np.float32)


def _frequencies(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    return 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def rope_tables(rope: dict[str, Any], head_dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), fp32 [length, head_dim / 2]."""
    factors = frequency_factors(rope, head_dim)
    frequencies = _frequencies(rope, head_dim) / (1.0 if factors is None else factors)
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def widened_tables(rope: dict[str, Any], rotary_dim: int, head_dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), fp32 [length, head_dim / 2], that leave all channels but the first `rotary_dim` as they are, once the
    rows of q and k are in the order of `widen_rotary`."""
    cos, sin = rope_tables(rope, rotary_dim, length)
    missing = ((0, 0), (0, (head_dim - rotary_dim) // 2))
    return np.pad(cos, missing, constant_values=1.0), np.pad(sin, missing)


def widen_rotary(array: np.ndarray, head_dim: int, rotary_dim: int) -> np.ndarray:
    """Rows of q or k, [heads * D, ...], so that a rotation of whole heads in halves turns each rotated channel with the
    one that a rotation of `rotary_dim` channels would have turned it with. Scores stay the same."""
    heads = array.reshape(-1, head_dim, *array.shape[1:])
    rotated, half = heads[:, :rotary_dim], (head_dim - rotary_dim) // 2
    left = heads[:, rotary_dim:]
    parts = (rotated[:, : rotary_dim // 2], left[:, :half], rotated[:, rotary_dim // 2 :], left[:, half:])
    return np.concatenate(parts, axis=1).reshape(array.shape)


def permute_rope(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, [heads * D, ...], from half-split to interleaved rotary order.

    Hugging Face rotates channel i with i + D/2, Meta's code and llama.cpp's NORM rope rotate 2i with 2i + 1. Scores
    stay the same as long as q and k are permuted alike; v and o are not rotated and keep their order.
    """
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])  # [heads, half, D / 2, ...]
    return halves.swapaxes(1, 2).reshape(array.shape)
