"""Say why an export target cannot hold a model, before the model is trained or written. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...runtime.base.errors import ModelError
from .architecture import Architecture
from .attention import SCALING, LayerAttention, context_length, layer_attention
from .file_types import irregular_gguf

ROPES = ("default", *SCALING)
"""Values of rope_type that the graphs of our exporters compute."""

GGUF_TARGETS = ("gguf", "web")
TRACED_TARGETS = ("onnx", "executorch")
TARGETS = (*GGUF_TARGETS, *TRACED_TARGETS, "hf-uniform")
"""Targets with rules. Those of hf-uniform are transformers', which trains the model."""

GGUF_FREQUENCIES = ("llama", "deci")
"""llama.cpp architectures that read frequency factors, as llama3's rope needs (llama-cpp-python 0.3.36)."""
GGUF_WINDOWS = ("gemma3",)
"""llama.cpp architectures with windows in some layers. The context of others ends at the window."""
NO_ROPE_EVERY = 4
"""In llama.cpp's `smollm3`, the last of this many layers has no rotary embedding."""
MAX_GGUF_LAYERS = 512
"""LLAMA_MAX_LAYERS"""


def check_target(target: str, config: Mapping[str, Any], architecture: Architecture, is_irregular: bool = True) -> None:
    """Raise ModelError if `target` cannot hold a model that is trained from one with this config.json.

    `is_irregular` tells whether layers get widths of their own.
    """
    attention, family = layer_attention(config, architecture), architecture.family
    context_length(config, architecture)  # refuses one of one token
    if target in TRACED_TARGETS:
        _check_rope_types(target, attention)
    elif target in GGUF_TARGETS:
        if is_irregular and not irregular_gguf(architecture):
            head = " with an untied head" if architecture.parts.qk_norm == "head" else ""
            raise ModelError(
                f"{target}: llama.cpp holds irregular layers of {family}{head} only zero-padded, which is no smaller; "
                "use --layout uniform"
            )
        name = irregular_gguf(architecture) if is_irregular else architecture.parts.gguf
        check_gguf(name, attention, architecture)


def check_gguf(name: str, attention: Sequence[LayerAttention], architecture: Architecture) -> None:
    """Raise ModelError if llama.cpp's architecture `name` cannot hold layers with these settings."""
    if len(architecture.layers) > MAX_GGUF_LAYERS:
        raise ModelError(f"gguf holds at most {MAX_GGUF_LAYERS} layers; the model has {len(architecture.layers)}")
    _check_rope_types("gguf", attention)
    if name == "smollm3" and not any(layer.num_attention_heads for layer in architecture.layers):
        raise ModelError("gguf: no layer has attention, which llama.cpp's smollm3 needs; choose onnx or executorch")
    for index, (settings, layer) in enumerate(zip(attention, architecture.layers, strict=True)):
        kind = settings.rope["rope_type"] if settings.rope else "default"
        is_readable = kind in ("default", "linear") or name in GGUF_FREQUENCIES
        if not is_readable or (settings.window and name in GGUF_WINDOWS and kind != "default"):
            where = "window layers of " if settings.window else ""
            raise ModelError(
                f"gguf: layer {index} has a {kind} rope, which {where}llama.cpp's {name} cannot store; choose onnx or "
                "executorch"
            )
        has_no_rope = (index + 1) % NO_ROPE_EVERY == 0
        if name == "smollm3" and layer.num_attention_heads and (settings.rope is None) != has_no_rope:
            raise ModelError(
                f"gguf: llama.cpp's smollm3 has no rotary embedding in every fourth layer, and layer {index} of the "
                "model disagrees (layers were removed?); choose onnx or executorch"
            )


def _check_rope_types(target: str, attention: Sequence[LayerAttention]) -> None:
    """Raise ModelError for a rope that our graphs do not compute."""
    for index, settings in enumerate(attention):
        if settings.rope and settings.rope["rope_type"] not in ROPES:
            raise ModelError(
                f"{target}: layer {index} has rope_type {settings.rope['rope_type']!r}, which is not supported; "
                f"{', '.join(ROPES)} are. hf-uniform exports it"
            )
