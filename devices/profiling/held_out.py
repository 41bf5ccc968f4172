"""Irregular random models that no table has seen, and how well it predicts them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...runtime.latency.profile import HeldOutError
from ...runtime.latency.shape import DecoderShape, LayerShape
from .stacks import MULTIPLE, Widths

ABSENT = 0.1
"""Share of layers without attention, and without FFN."""


def irregular_shapes(widths: Widths, count: int, seed: int = 0) -> list[DecoderShape]:
    """Random decoders of a source of `widths`, each layer with its own widths."""
    random = np.random.default_rng(seed)
    return [_irregular(widths, random) for _ in range(count)]


def _irregular(widths: Widths, random: np.random.Generator) -> DecoderShape:
    hidden = _multiple(random, widths.hidden_size // 2, widths.hidden_size)
    vocab = _multiple(random, widths.vocab_size // 8, widths.vocab_size)
    count = int(random.integers(max(2, widths.num_layers // 3), widths.num_layers + 1))
    return DecoderShape(hidden, widths.head_dim, vocab, tuple(_layer(widths, random) for _ in range(count)))


def _multiple(random: np.random.Generator, least: int, most: int) -> int:
    return MULTIPLE * int(random.integers(max(1, least // MULTIPLE), most // MULTIPLE + 1))


def _layer(widths: Widths, random: np.random.Generator) -> LayerShape:
    groups = int(random.integers(1, widths.num_key_value_heads + 1))
    ratio = int(random.integers(1, widths.queries_per_group + 1))
    width = _multiple(random, MULTIPLE, widths.intermediate_size)
    absent = random.random()
    if absent < ABSENT:
        return LayerShape(0, 0, width)
    return LayerShape(groups * ratio, groups, 0 if absent > 1 - ABSENT else width)


def removals(widths: Widths) -> dict[str, DecoderShape]:
    """The source, first, and what single removals leave of it."""
    whole, count = widths.whole, widths.num_layers
    third, channels, stem = count // 3, widths.intermediate_size // 6, widths.hidden_size // 6
    ratio = widths.queries_per_group
    fewer = LayerShape(whole.num_attention_heads - ratio, whole.num_key_value_heads - 1, whole.intermediate_size)
    narrower = LayerShape(whole.num_attention_heads, whole.num_key_value_heads, whole.intermediate_size - channels)
    no_attention = LayerShape(0, 0, whole.intermediate_size)
    no_ffn = LayerShape(whole.num_attention_heads, whole.num_key_value_heads, 0)
    rest = (whole,) * (count - third)
    return {
        "nothing": widths.decoder((whole,) * count),
        "a key/value group of every layer": widths.decoder((fewer,) * count),
        f"the attention of {third} layers": widths.decoder(rest + (no_attention,) * third),
        f"{third} whole layers": widths.decoder(rest),
        f"{channels} FFN channels of every layer": widths.decoder((narrower,) * count),
        f"the FFN of {third} layers": widths.decoder(rest + (no_ffn,) * third),
        f"{stem} stem channels": widths.decoder((whole,) * count, widths.hidden_size - stem),
    }


def error_of(depth: int, measured_ms: Sequence[float], predicted_ms: Sequence[float]) -> HeldOutError:
    """The error over several models at one depth."""
    measured, predicted = np.array(measured_ms), np.array(predicted_ms)
    off = np.abs(predicted / measured - 1)
    spread = float(((measured - measured.mean()) ** 2).sum())
    r2 = 1 - float(((measured - predicted) ** 2).sum()) / spread if spread else 0.0
    return HeldOutError(depth, len(measured), float(np.median(off)), float(off.max()), r2)
