"""From the milliseconds of stacks and whole models to the table of parts.

A difference of two stacks holds the noise of both, and a model of many layers finds less of itself in the caches than
a stack of twelve. So every condition gets a formula of nine rates, fitted to all models at once; a node that a stack
measures keeps what the formula leaves of that stack, which is where the steps of a kernel are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from ...runtime.latency.grid import Grid
from ...runtime.latency.shape import DecoderShape, LayerShape
from ...runtime.latency.table import PARTS, LatencyTable
from .stacks import Design

TERMS = 9
OUTLIER = 0.05
"""Relative error beyond which a model counts less: something else ran beside it."""
PASSES = 20
"""Of fitting and weighing again."""


def assemble(
    design: Design, depths: tuple[int, ...], prompts: tuple[int, ...], measured_ms: Mapping[DecoderShape, np.ndarray]
) -> LatencyTable:
    """The table of a device, of the milliseconds [depths and prompts] of the design's stacks and other models."""
    features = np.array([_model_features(shape) for shape in measured_ms])
    measured = np.array(list(measured_ms.values()))
    rates = np.stack([_fit(features, measured[:, index]) for index in range(measured.shape[1])], axis=1)
    left = {shape: _left(ms, _model_features(shape) @ rates) / design.num_on_top for shape, ms in measured_ms.items()}
    axes = {
        "hidden_size": design.hidden_sizes,
        "vocab_size": (1, design.widths.vocab_size),
        "num_key_value_heads": design.groups,
        "queries_per_group": design.ratios,
        "intermediate_size": design.ffn_widths,
    }
    parts = {}
    for part, names in PARTS.items():
        nodes = list(itertools.product(*(axes[name] for name in names)))
        ms = [
            _part_features(part, design.widths.head_dim, *node) @ rates + _kept(design, part, node, left)
            for node in nodes
        ]
        shape = (*(len(axes[name]) for name in names), measured.shape[1])
        parts[part] = Grid(tuple(axes[name] for name in names), np.array(ms).reshape(shape))
    return LatencyTable(design.widths.head_dim, depths, prompts, parts)


def _left(measured: np.ndarray, formula: np.ndarray) -> np.ndarray:
    """What the formula leaves of a stack [conditions]; nothing where that is more than a step: a disturbance."""
    return np.where(np.abs(formula / measured - 1) < OUTLIER, measured - formula, 0.0)


def _kept(
    design: Design, part: str, node: tuple[int, ...], left: Mapping[DecoderShape, np.ndarray]
) -> np.ndarray | float:
    """The share of one layer on top of a stack that measures the node."""
    hidden, *widths = node
    if part not in ("attention", "ffn"):
        return 0.0
    layer = design.attention(widths[0], widths[1]) if part == "attention" else design.ffn(widths[0])
    if layer == design.widths.whole:  # as much the one as the other's
        return left.get(design.stack(hidden, layer), np.zeros(1)) / 2
    return left.get(design.stack(hidden, layer), 0.0)


def _part_features(part: str, head_dim: int, hidden: float, *widths: float) -> np.ndarray:
    """One per token, attention and FFN; millions of weights in each and the head; heads; groups; one per absent FFN."""
    if part == "token":
        return np.array([1.0, 0, 0, 0, 0, 0, 0, 0, 0])
    if part == "head":
        return np.array([0, 0, 0, 0, 0, hidden * widths[0] / 1e6, 0, 0, 0])
    if part == "attention":
        groups, heads = widths[0], widths[0] * widths[1]
        return np.array([0, 1.0, 0, 2e-6 * hidden * head_dim * (heads + groups), 0, 0, heads, groups, 0])
    if part == "ffn":
        return np.array([0, 0, 1.0, 0, 3e-6 * hidden * widths[0], 0, 0, 0, 0])
    return np.array([0.0] * (TERMS - 1) + [part == "no_ffn"])


def _model_features(shape: DecoderShape) -> np.ndarray:
    """Sums of the terms over a whole model."""
    once = [("token", ()), ("head", (shape.vocab_size,))]
    parts = once + [part for layer in shape.present_layers for part in _layer_parts(layer)]
    return np.sum([_part_features(part, shape.head_dim, shape.hidden_size, *widths) for part, widths in parts], axis=0)


def _layer_parts(layer: LayerShape) -> Sequence[tuple[str, tuple[float, ...]]]:
    groups, width = layer.num_key_value_heads, layer.intermediate_size
    attention = [("attention", (groups, layer.num_attention_heads / groups))] if groups else []
    return [*attention, ("ffn", (width,)) if width else ("no_ffn", ())]


def _fit(features: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Rates, none negative, for small relative errors: least squares again and again, with less of the outliers."""
    weights = 1 / measured
    rates = np.zeros(features.shape[1])
    for _ in range(PASSES):
        active = list(range(features.shape[1]))
        while True:
            solution, *_ = np.linalg.lstsq(features[:, active] * weights[:, None], measured * weights, rcond=None)
            if solution.min() >= 0 or len(active) == 1:
                break
            del active[int(solution.argmin())]
        rates[:] = 0
        rates[active] = np.maximum(solution, 0)
        off = np.abs(features @ rates / measured - 1)
        weights = np.sqrt(np.minimum(1, OUTLIER / np.maximum(off, 1e-9))) / measured
    return rates
