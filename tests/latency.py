"""A made-up device whose milliseconds follow a formula, and its table."""

from __future__ import annotations

import itertools

import numpy as np

from efficientllm.runtime.latency.profile import DeviceProfile, HeldOutError, MeasuredOn
from efficientllm.runtime.latency.shape import DecoderShape
from efficientllm.runtime.latency.table import Grid, LatencyTable

HEAD_DIM = 64
DEPTHS = (0, 512, 2048)
PROMPTS = (1, 128, 512)
HIDDEN, VOCAB, GROUPS, RATIOS, WIDTHS = (256, 576), (512, 49152), (1, 3), (1, 3), (256, 1536)

MEASURED_ON = MeasuredOn(
    device="local",
    cpu="a CPU",
    engine="llama.cpp",
    engine_version="llama-cpp-python 0.3",
    quantization="q4_0",
    threads=1,
    clock="cpu",
    measured_at="2026-11-26T00:00:00+00:00",
)


def _by_condition(weights: float, cached: float, overhead: float) -> np.ndarray:
    """Milliseconds [conditions] of a part with so many weights, and cached channels of query heads per position."""
    decode = [1e-7 * weights + 1e-6 * cached * depth + overhead for depth in DEPTHS]
    prefill = [length * (3e-8 * weights + 2e-7 * cached * length) + overhead for length in PROMPTS]
    return np.array([*decode, *prefill])


def true_ms(shape: DecoderShape, depth: int) -> float:
    """What the made-up device takes for a token."""
    total = 0.05 + 1e-7 * shape.hidden_size * shape.vocab_size
    for layer in shape.present_layers:
        heads, groups, width = layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size
        total += 1e-7 * shape.hidden_size * (2 * HEAD_DIM * (heads + groups) + 3 * width)
        total += 1e-6 * HEAD_DIM * heads * depth + 0.01 * bool(heads) + 0.02 * bool(width)
    return total


def made_up_profile() -> DeviceProfile:
    """The made-up device's, measured without error."""

    def grid(axes: tuple[tuple[int, ...], ...], ms: object) -> Grid:
        rows = [ms(*point) for point in itertools.product(*axes)]  # type: ignore[operator]
        return Grid(axes, np.array(rows).reshape(*(len(axis) for axis in axes), -1))

    nothing = np.zeros(len(DEPTHS) + len(PROMPTS))
    parts = {
        "token": grid((HIDDEN,), lambda h: _by_condition(0, 0, 0.05)),
        "head": grid((HIDDEN, VOCAB), lambda h, v: nothing + 1e-7 * h * v),
        "attention": grid(
            (HIDDEN, GROUPS, RATIOS),
            lambda h, g, r: _by_condition(2 * h * HEAD_DIM * g * (r + 1), HEAD_DIM * g * r, 0.01),
        ),
        "no_attention": grid((HIDDEN,), lambda h: nothing),
        "ffn": grid((HIDDEN, WIDTHS), lambda h, w: _by_condition(3 * h * w, 0, 0.02)),
        "no_ffn": grid((HIDDEN,), lambda h: nothing),
    }
    table = LatencyTable(HEAD_DIM, DEPTHS, PROMPTS, parts)
    return DeviceProfile(MEASURED_ON, table, (HeldOutError(0, 3, 0.02, 0.05, 0.99),), ({"hidden_size": 576},))
