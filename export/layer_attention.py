"""Read the attention settings of each layer from config.json: rotary embedding, window, scale.

Also compute rotary tables and convert the order of rows of q and k. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.base.errors import ModelError
from ..train.model.architecture import Architecture
from ..train.model.folder_files import positive_number, whole_number

LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""Parameters of Llama 3's rope."""

FULL, WINDOW = "full_attention", "sliding_attention"
"""Values of layer_types."""


@dataclass(frozen=True)
class LayerAttention:
    """Attention settings of one layer."""

    rope: dict[str, Any] | None
    """Parameters of the rotary embedding; None without."""
    rotary_dim: int
    """Rotated channels at the beginning of a head."""
    window: int
    """Number of visible tokens, itself included; 0 for all earlier tokens."""
    scale: float
    """Factor of the scores."""

    @property
    def rotary_key(self) -> str:
        """Return a name, fit for an identifier, that two layers share if all parameters of their ropes are equal."""
        parameters = json.dumps([self.rope, self.rotary_dim], sort_keys=True)
        return hashlib.sha256(parameters.encode()).hexdigest()[:16]


def layer_attention(config: Mapping[str, Any], architecture: Architecture) -> tuple[LayerAttention, ...]:
    """Return the settings of every layer."""
    parts, head_dim = architecture.parts, architecture.head_dim
    count = len(architecture.layers)
    ropes = {kind: rope_parameters(config, kind) for kind in (FULL, WINDOW)}
    scale = positive_number(config, parts.scale_setting, head_dim) if parts.scale_setting else head_dim
    window = whole_number(config, "sliding_window", 0) if parts.has_window_layers else 0
    kinds, rotary = layer_kinds(config, parts.has_window_layers, count), _rotary(config, architecture)
    found = []
    for kind, is_rotary in zip(kinds, rotary, strict=True):
        rope = ropes[kind]
        share = positive_number(rope, "partial_rotary_factor", 0.25) if parts.has_partial_rotary else 1.0
        rotary_dim = int(head_dim * share)
        found.append(
            LayerAttention(
                rope if is_rotary else None,
                rotary_dim if is_rotary else 0,
                window if kind == WINDOW else 0,
                scale**-0.5,
            )
        )
    return tuple(found)


def layer_kinds(config: Mapping[str, Any], has_windows: bool, count: int) -> list[str]:
    """Return FULL or WINDOW of `count` layers, with transformers' defaults for older config.json files."""
    if not has_windows:
        return [FULL] * count
    every = whole_number(config, "sliding_window_pattern", config.get("_sliding_window_pattern", 6), least=1)
    kinds = config.get("layer_types") or [WINDOW if (index + 1) % every else FULL for index in range(count)]
    return _of_layers("layer_types", kinds, count, (FULL, WINDOW))


def _rotary(config: Mapping[str, Any], architecture: Architecture) -> list[int]:
    count = len(architecture.layers)
    if not architecture.parts.has_rotary_layers:
        return [1] * count
    every = whole_number(config, "no_rope_layer_interval", 4, least=1)
    flags = config.get("no_rope_layers") or [int((index + 1) % every != 0) for index in range(count)]
    return _of_layers("no_rope_layers", flags, count, (0, 1))


def _of_layers(name: str, values: Any, count: int, known: tuple[Any, ...]) -> list[Any]:
    if not isinstance(values, list) or len(values) < count or not all(value in known for value in values):
        raise ModelError(f"config.json: {name} must list one of {known} for each of the {count} layers")
    return values[:count]


def rope_parameters(config: Mapping[str, Any], kind: str = FULL) -> dict[str, Any]:
    """Return rope_theta, rope_type, partial_rotary_factor and the scaling parameters of layers of a kind."""
    values = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(values, dict):
        raise ModelError(f"config.json: rope_parameters is {values!r}, but must be an object")
    is_nested = FULL in values or WINDOW in values
    values = (values.get(kind) or {}) if is_nested else values
    theta = config.get("rope_theta", config.get("rotary_emb_base", 10000.0))
    if kind == WINDOW and not is_nested:
        values, theta = {}, config.get("rope_local_base_freq", 10000.0)
    rope_type = values.get("rope_type", values.get("type", "default"))
    theta = positive_number(values, "rope_theta", theta)
    scaling = {name: positive_number(values, name) for name in (LLAMA3_SCALING if rope_type == "llama3" else ())}
    share = {"partial_rotary_factor": config["rotary_pct"]} if "rotary_pct" in config else {}
    return {**share, **values, **scaling, "rope_theta": theta, "rope_type": rope_type}


def context_length(config: Mapping[str, Any], architecture: Architecture) -> int:
    """Return the number of tokens over which all runtimes agree.

    It ends at the window of a family with a window in every layer (Mistral), because some runtimes ignore it.
    """
    positions = whole_number(config, "max_position_embeddings", least=1)
    if architecture.parts.has_window_layers:
        return positions
    return min(positions, whole_number(config, "sliding_window", sys.maxsize) or sys.maxsize)


def frequency_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray | None:
    """Return the divisors of the frequencies, fp32 [head_dim / 2]; None without scaling.

    Only Llama 3's rule is supported (transformers' `_compute_llama3_parameters`). Raises ModelError for any other.
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
    """Return (cos, sin), fp32 [length, head_dim / 2]."""
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
        return array.reshape(-1, self.width, *array.shape[1:])[:, self.places].reshape(-1, *array.shape[1:])


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
    """Reorder rows of q or k, [heads * D, ...], from half-split to interleaved rotary order.

    Hugging Face rotates channel i with i + D/2. Meta's code and llama.cpp's NORM rope rotate 2i with 2i + 1. Scores
    stay the same if q and k are permuted alike. v and o are not rotated and keep their order.
    """
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])  # [heads, half, D / 2, ...]
    return halves.swapaxes(1, 2).reshape(array.shape)
