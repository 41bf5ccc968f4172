"""From the milliseconds of stacks and whole models to the table of parts.

A difference of two stacks holds the noise of both, and a model of many layers finds less of itself in the caches than
a stack of twelve. So every condition gets a formula of eleven rates of parts, one for weights that the CPU's cache has
no room for and one for rows of an odd number of blocks, fitted to all models at once; a node that a stack measures
keeps what the formula leaves of that stack, which is where other steps of a kernel are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from ...runtime.latency.shape import DecoderShape, LayerShape
from ...runtime.latency.table import PARTS, Grid, LatencyTable, Surcharge, missed, odd_rows
from .stacks import Design

TERMS = 11
"""Of the parts."""
OUTLIER = 0.05
"""Relative error beyond which a model counts less: something else ran beside it."""
NOISE = 2.0
"""What the formula leaves of a stack counts beyond so many medians of what it leaves of all models."""
CAPACITIES = 16
"""Sizes of the cache that are tried."""
WORTH_A_TERM = 0.8
"""Share of the squared errors without it that a spill may leave: one more rate fits a little better by chance."""
PASSES = 20
"""Of fitting and weighing again."""


def assemble(
    design: Design, depths: tuple[int, ...], prompts: tuple[int, ...], measured_ms: Mapping[DecoderShape, np.ndarray]
) -> LatencyTable:
    """The table of a device, of the milliseconds [depths and prompts] of the design's stacks and other models."""
    measured = np.array(list(measured_ms.values()))
    rates, surcharge = _fit_all(list(measured_ms), measured)
    fitted = np.array([_model_features(shape) @ rates + surcharge.of(shape) for shape in measured_ms])
    noise = NOISE * np.median(np.abs(fitted / measured - 1), axis=0)
    left = {
        shape: _left(ms, values, noise) / design.num_on_top
        for (shape, ms), values in zip(measured_ms.items(), fitted, strict=True)
    }
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
    return LatencyTable(design.widths.head_dim, depths, prompts, parts, surcharge)


def _left(measured: np.ndarray, formula: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """What the formula leaves of a stack [conditions] beyond the `noise` of all, relative; nothing where that is more
    than a step: a disturbance. A layer's share of it counts for every layer of a model, so noise would count thirty
    times."""
    left = measured - formula
    beyond = np.sign(left) * np.maximum(np.abs(left) - noise * measured, 0.0)
    return np.where(np.abs(left / measured) < OUTLIER, beyond, 0.0)


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
    """One per token, attention and FFN; millions of weights in each and the head; heads; groups; one per absent FFN;
    thousands of FFN channels and of the head's rows, each a product of its own."""
    if part == "token":
        return np.array([1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    if part == "head":
        return np.array([0, 0, 0, 0, 0, hidden * widths[0] / 1e6, 0, 0, 0, 0, widths[0] / 1e3])
    if part == "attention":
        groups, heads = widths[0], widths[0] * widths[1]
        return np.array([0, 1.0, 0, 2e-6 * hidden * head_dim * (heads + groups), 0, 0, heads, groups, 0, 0, 0])
    if part == "ffn":
        return np.array([0, 0, 1.0, 0, 3e-6 * hidden * widths[0], 0, 0, 0, 0, widths[0] / 1e3, 0])
    return np.array([0, 0, 0, 0, 0, 0, 0, 0, part == "no_ffn", 0, 0], float)


def _model_features(shape: DecoderShape) -> np.ndarray:
    """Sums of the terms over a whole model."""
    once = [("token", ()), ("head", (shape.vocab_size,))]
    parts = once + [part for layer in shape.present_layers for part in _layer_parts(layer)]
    return np.sum([_part_features(part, shape.head_dim, shape.hidden_size, *widths) for part, widths in parts], axis=0)


def _layer_parts(layer: LayerShape) -> Sequence[tuple[str, tuple[float, ...]]]:
    groups, width = layer.num_key_value_heads, layer.intermediate_size
    attention = [("attention", (groups, layer.num_attention_heads / groups))] if groups else []
    return [*attention, ("ffn", (width,)) if width else ("no_ffn", ())]


def _fit_all(shapes: Sequence[DecoderShape], measured: np.ndarray) -> tuple[np.ndarray, Surcharge]:
    """Rates [TERMS, conditions] of the parts, and the surcharge, of the cache that fits each condition best."""
    sizes = np.array([shape.num_weights for shape in shapes], float)
    features = np.array([[*_model_features(shape), 1e-3 * odd_rows(shape)] for shape in shapes])
    capacities = np.geomspace(sizes.min(), sizes.max() / 2, CAPACITIES)
    found = [_fit_one(features, sizes, capacities, ms) for ms in measured.T]
    rates = np.array([fit[:TERMS] for fit, _ in found]).T
    odd_ms, spill_ms = (np.array([fit[index] for fit, _ in found]) for index in (TERMS, TERMS + 1))
    return rates, Surcharge(np.array([capacity for _, capacity in found]), spill_ms, odd_ms)


def _fit_one(
    features: np.ndarray, sizes: np.ndarray, capacities: np.ndarray, ms: np.ndarray
) -> tuple[np.ndarray, float]:
    """Rates of the features and of spilt weights, and the capacity from which they spill."""
    without = np.append(_fit(features, ms), 0.0)
    fits = []
    for capacity in capacities:
        columns = np.column_stack([features, 1e-6 * sizes * missed(sizes, capacity)])
        fit = _fit(columns, ms)
        fits.append((_loss(columns @ fit, ms), fit, float(capacity)))
    loss, fit, capacity = min(fits, key=lambda each: each[0])
    is_worth_it = loss < WORTH_A_TERM * _loss(features @ without[:-1], ms)
    return (fit, capacity) if is_worth_it else (without, 1.0)


def _loss(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Squares of relative errors; those of outliers count as OUTLIER."""
    return float((np.minimum(np.abs(predicted / measured - 1), OUTLIER) ** 2).sum())


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
