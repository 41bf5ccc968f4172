"""Compute rotary tables, and place and order the channels of heads. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


def frequency_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray | None:
    """Return the divisors of the frequencies, fp32 [head_dim / 2]; None without scaling.

    The rule of llama3 is transformers' `_compute_llama3_parameters`. check_target refuses other types before.
    """
    kind = rope["rope_type"]
    if kind == "default":
        return None
    factor = rope["factor"]
    if kind == "linear":
        return np.full(head_dim // 2, factor, np.float32)
    assert kind == "llama3"
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * np.pi / _frequencies(rope, head_dim)
    smooth = (original / wavelengths - low) / (high - low)
    between = 1.0 / ((1 - smooth) / factor + smooth)
    scaled = np.where(wavelengths > original / low, factor, between)
    scaled = np.where(wavelengths < original / high, 1.0, scaled)
    return scaled.astype(np.float32)


def _frequencies(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    return 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def rope_tables(rope: dict[str, Any], head_dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (cos, sin), fp32 [length, head_dim / 2]."""
    # angles in fp64: an fp32 angle of thousands of radians has lost the digits that its cosine depends on
    factors = frequency_factors(rope, head_dim)
    frequencies = _frequencies(rope, head_dim) / (1.0 if factors is None else factors)
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def widened_tables(rope: dict[str, Any], rotary_dim: int, head_dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (cos, sin), fp32 [length, head_dim / 2], that rotate only `rotary_dim` channels of a head.

    The rows of q and k must have the places of `rotary_places`.
    """
    cos, sin = rope_tables(rope, rotary_dim, length)
    missing = ((0, 0), (0, (head_dim - rotary_dim) // 2))
    # the angle 0: these channels stay as they are
    return np.pad(cos, missing, constant_values=1.0), np.pad(sin, missing)


@dataclass(frozen=True)
class HeadPlaces:
    """Places of the channels of a head in a head of `width` channels. The other channels are zero."""

    width: int
    places: np.ndarray
    """int [D]"""

    def widen(self, array: np.ndarray) -> np.ndarray:
        """Return rows [heads * D, ...] as rows [heads * width, ...]."""
        heads = array.reshape(-1, len(self.places), *array.shape[1:])
        wide = np.zeros((len(heads), self.width, *array.shape[1:]), array.dtype)
        wide[:, self.places] = heads
        return wide.reshape(-1, *array.shape[1:])

    def narrow(self, array: np.ndarray) -> np.ndarray:
        """Return rows [heads * width, ...] as rows [heads * D, ...], the inverse of `widen`."""
        heads = array.reshape(-1, self.width, *array.shape[1:])
        return heads[:, self.places].reshape(-1, *array.shape[1:])


def rotary_places(head_dim: int, rotary_dim: int, width: int) -> HeadPlaces:
    """Return the places of q's and k's channels for a rotation of all `width` channels in halves.

    Each rotated channel is paired with the same channel as in a rotation of `rotary_dim` channels. Scores stay the
    same.
    """
    half = rotary_dim // 2
    rotated = [*range(half), *range(width // 2, width // 2 + half)]
    others = [place for place in range(width) if place not in rotated]
    return HeadPlaces(width, np.array([*rotated, *others[: head_dim - rotary_dim]]))


def permute_rope(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of q or k, [heads * D, ...], from half-split to interleaved rotary order."""
    # Hugging Face rotates channel i with i + D/2. Meta's code and llama.cpp's NORM rope rotate 2i with 2i + 1. Scores
    # stay the same if q and k are permuted alike. v and o are not rotated and keep their order.
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])  # [heads, half, D / 2, ...]
    return halves.swapaxes(1, 2).reshape(array.shape)


def unpermute_rope(array: np.ndarray, heads: int) -> np.ndarray:
    """Return rows in half-split order, the inverse of `permute_rope`."""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
