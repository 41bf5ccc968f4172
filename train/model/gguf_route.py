"""Which of llama.cpp's architectures with widths per layer holds a model. Imports no torch."""

from __future__ import annotations

from .architecture import Architecture

PER_LAYER_NORMS = {"before_attention", "before_ffn"}
"""Where the architectures with widths per layer have norms."""


def irregular_gguf(architecture: Architecture) -> str:
    """llama.cpp's architecture with widths per layer that computes what a family's parts do; "" where there is none.

    A LayerNorm without bias can be written as an RMS norm (rescaling.py).
    """
    parts = architecture.parts
    is_foreign = (
        (parts.is_parallel, parts.has_partial_rotary, parts.has_rotary_layers, parts.has_window_layers),
        (parts.output_bias, parts.ffn_bias, parts.norm.has_bias, parts.scales_embedding, bool(parts.scale_setting)),
        (not parts.is_gated, parts.activation != "silu", parts.qk_norm == "width", set(parts.norms) != PER_LAYER_NORMS),
    )
    if any(map(any, is_foreign)):
        return ""
    if not parts.qk_norm:
        return "deci"
    return "" if parts.qkv_bias or parts.norm.takes_mean or not architecture.tie_word_embeddings else "openelm"
