"""Read the attention settings of each layer from config.json: rotary embedding, window, scale. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...runtime.base.errors import ModelError
from .architecture import Architecture
from .folder_files import positive_number, whole_number

SCALING = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "linear": ("factor",),
}
"""rope_type -> its parameters, which must be positive."""

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
    ropes = {kind: rope_parameters(config, kind if parts.has_window_rope else FULL) for kind in (FULL, WINDOW)}
    scale = positive_number(config, parts.scale_setting, head_dim) if parts.scale_setting else head_dim
    window = whole_number(config, "sliding_window", 0) if parts.has_window_layers else 0
    kinds, rotary = _layer_kinds(config, architecture), _rotary(config, architecture)
    found = []
    for kind, is_rotary in zip(kinds, rotary, strict=True):
        rope = ropes[kind]
        share = positive_number(rope, "partial_rotary_factor", 0.25 if parts.has_partial_rotary else 1.0)
        rotary_dim = int(head_dim * share)
        if rotary_dim != head_dim and not parts.has_partial_rotary:
            raise ModelError(
                f"config.json: partial_rotary_factor is {share}; {architecture.family} rotates whole heads"
            )
        if rotary_dim % 2:  # transformers rotates one channel more, and other readers one less
            raise ModelError(f"config.json: {rotary_dim} of {head_dim} channels are rotated; the number must be even")
        found.append(
            LayerAttention(
                rope if is_rotary else None,
                rotary_dim if is_rotary else 0,
                window if kind == WINDOW else 0,
                scale**-0.5,
            )
        )
    return tuple(found)


def _layer_kinds(config: Mapping[str, Any], architecture: Architecture) -> list[str]:
    """Return FULL or WINDOW of every layer, with transformers' defaults for config.json files without layer_types."""
    count, parts = len(architecture.layers), architecture.parts
    if not parts.has_window_layers or config.get("use_sliding_window") is False:
        return [FULL] * count
    if parts.has_window_rope:
        every = whole_number(config, "sliding_window_pattern", config.get("_sliding_window_pattern", 6), least=1)
        kinds = [WINDOW if (index + 1) % every else FULL for index in range(count)]
    else:
        first = whole_number(config, "max_window_layers", 28) if config.get("use_sliding_window") else count
        kinds = [WINDOW if index >= first else FULL for index in range(count)]
    return _of_layers("layer_types", config.get("layer_types") or kinds, count, (FULL, WINDOW))


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
    values, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    for name, given in {"rope_parameters": values, "rope_scaling": old}.items():
        if not isinstance(given, dict):
            raise ModelError(f"config.json: {name} is {given!r}, but must be an object")
    values = _agreed(values, old) if values and old and values != old else values or old
    is_nested = FULL in values or WINDOW in values
    values = (values.get(kind) or {}) if is_nested else values
    theta = config.get("rope_theta", config.get("rotary_emb_base", 10000.0))
    if kind == WINDOW and not is_nested:
        values, theta = {}, config.get("rope_local_base_freq", 10000.0)
    rope_type = values.get("rope_type", values.get("type", "default"))
    theta = positive_number(values, "rope_theta", theta)
    scaling = {name: positive_number(values, name) for name in SCALING.get(rope_type, ())}
    share = config.get("partial_rotary_factor", config.get("rotary_pct"))
    whole = {} if share is None else {"partial_rotary_factor": share}
    return {**whole, **values, **scaling, "rope_theta": theta, "rope_type": rope_type}


def _agreed(values: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Return rope_parameters if rope_scaling, their old name, agrees. transformers reads rope_scaling alone."""
    same = values.get(FULL) or values  # a folder for old and new readers has the rope of full layers there
    for name, value in old.items():
        new = "rope_type" if name == "type" else name
        if (same.get(new) or same.get(name)) != value:
            raise ModelError(
                f"config.json: rope_scaling has {name} {value!r}, rope_parameters has {same.get(new)!r}; remove one of "
                "the two"
            )
    return values


def context_length(config: Mapping[str, Any], architecture: Architecture) -> int:
    """Return the number of tokens over which all runtimes agree.

    Raises ModelError if it is one token, after which no runtime has room for the next.
    """
    length, setting = whole_number(config, "max_position_embeddings", least=1), "max_position_embeddings"
    if not architecture.parts.has_window_layers:
        # some runtimes ignore the window of a family that has it in every layer (Mistral)
        window = whole_number(config, "sliding_window", sys.maxsize) or sys.maxsize
        length, setting = min((length, setting), (window, "sliding_window"))
    if length == 1:
        raise ModelError(f"config.json: {setting} is 1, a context of one token; an exported model needs at least 2")
    return length
