"""Fit of a latency table to the measured milliseconds of random models.

A difference of two stacks contains the noise of both. A model of many layers also finds a smaller share of its weights
in the CPU's caches than a stack of twelve layers. So each condition has one linear formula over FEATURES, with two
surcharges: for weights that exceed the CPU's cache, and for rows of an odd number of blocks. It is fitted to all models
at once. A node that a stack measures also keeps the residual of that stack, which contains the steps of kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ...runtime.base.extras import extra
from ...runtime.latency.shape import DecoderShape
from ...runtime.latency.table import PARTS, Grid, LatencyTable, Surcharge, missed, odd_rows
from .random_shapes import Design

FEATURES = (
    "token",
    "attention",
    "ffn",
    "attention_mweights",
    "ffn_mweights",
    "head_mweights",
    "heads",
    "groups",
    "no_ffn",
    "ffn_kchannels",
    "head_krows",
)
"""Features of a model: numbers of parts, millions of weights, heads, and thousands of FFN channels and LM head rows."""
SURCHARGES = ("odd_krows", "spilled_mweights")
"""Further columns of the fit: thousands of odd rows, and millions of weights that exceed the cache."""
OUTLIER = 0.05
"""Relative error above which a model has less weight, because other work probably disturbed its measurement."""
NOISE = 2.0
"""The residual of a stack counts from this multiple of the median residual of all models."""
NUM_CAPACITIES = 16
"""Number of cache sizes to try."""
MAX_SPILL_LOSS = 0.8
"""Largest loss with spilled weights, relative to without, that justifies them. Any further column fits a bit better."""
PASSES = 20
"""Fits with weights from the errors of the fit before."""
MAX_ITERATIONS = 10_000
"""Limit of the NNLS solver, far above the few dozen iterations that it needs."""

Solver = Callable[..., tuple[np.ndarray, float]]


def nnls_solver() -> Solver:
    """Return scipy's solver of non-negative least squares. Raises MissingExtraError without scipy."""
    with extra("bench"):
        from scipy.optimize import nnls
    return nnls


def features(**values: float) -> np.ndarray:
    """Return a row [FEATURES] with the named values and 0 elsewhere. Raises ValueError for an unknown name."""
    unknown = values.keys() - set(FEATURES)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: not among the features {', '.join(FEATURES)}")
    return np.array([float(values.get(name, 0)) for name in FEATURES])


def assemble(
    design: Design, depths: tuple[int, ...], prompts: tuple[int, ...], measured_ms: Mapping[DecoderShape, np.ndarray]
) -> LatencyTable:
    """Return the latency table of a device.

    `measured_ms` holds the milliseconds [conditions] of the design's stacks and of other models. The conditions are
    a decode at each of `depths`, then a prompt of each of `prompts` tokens.
    """
    shapes = list(measured_ms)
    measured = np.array(list(measured_ms.values()))
    rates, surcharge = _fit_conditions(shapes, measured)
    fitted = np.array([_model_features(shape) @ rates + surcharge.of(shape) for shape in shapes])
    residuals = _significant_residuals(measured, fitted) / design.num_top_layers
    layer_residuals = dict(zip(shapes, residuals, strict=True))
    nodes_by_axis = {
        "hidden_size": design.hidden_sizes,
        "vocab_size": (1, design.source.vocab_size),
        "num_key_value_heads": design.groups,
        "queries_per_group": design.ratios,
        "intermediate_size": design.ffn_widths,
    }
    parts = {}
    for part, names in PARTS.items():
        axes = tuple(nodes_by_axis[name] for name in names)
        ms = []
        for node in itertools.product(*axes):
            fitted_ms = _part_features(part, design.source.head_dim, *node) @ rates
            ms.append(fitted_ms + _node_residual(design, part, node, layer_residuals))
        values = np.array(ms).reshape(*map(len, axes), measured.shape[1])
        parts[part] = Grid(axes, values)
    return LatencyTable(design.source.head_dim, depths, prompts, parts, surcharge)


def _significant_residuals(measured: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Return the residuals [models, conditions] beyond the noise of all models, 0 for outliers."""
    # a layer's share of the residual is added for each layer of a model, so noise would be added up to thirty times
    noise = NOISE * np.median(np.abs(fitted / measured - 1), axis=0)
    residuals = measured - fitted
    beyond_noise = np.sign(residuals) * np.maximum(np.abs(residuals) - noise * measured, 0.0)
    # larger ones are a disturbance and not the step of a kernel
    return np.where(np.abs(residuals / measured) < OUTLIER, beyond_noise, 0.0)


def _node_residual(
    design: Design, part: str, node: tuple[int, ...], layer_residuals: Mapping[DecoderShape, np.ndarray]
) -> np.ndarray | float:
    """Return the residual of one layer in the stack that measures the node, and 0 if none does."""
    hidden, *widths = node
    if part not in ("attention", "ffn"):
        return 0.0
    layer = design.attention(widths[0], widths[1]) if part == "attention" else design.ffn(widths[0])
    residual = layer_residuals.get(design.stack(hidden, layer), 0.0)
    # Both parts share the residual of the source's own layer.
    return residual / 2 if layer == design.source_layer else residual


def _part_features(part: str, head_dim: int, hidden: float, *widths: float) -> np.ndarray:
    """Return the features of one part of a model."""
    if part == "token":
        return features(token=1)
    if part == "head":
        (rows,) = widths
        return features(head_mweights=hidden * rows / 1e6, head_krows=rows / 1e3)
    if part == "attention":
        groups, ratio = widths
        heads = groups * ratio
        mweights = 2e-6 * hidden * head_dim * (heads + groups)
        return features(attention=1, attention_mweights=mweights, heads=heads, groups=groups)
    if part == "ffn":
        (channels,) = widths
        return features(ffn=1, ffn_mweights=3e-6 * hidden * channels, ffn_kchannels=channels / 1e3)
    return features(no_ffn=part == "no_ffn")


def _model_features(shape: DecoderShape) -> np.ndarray:
    """Return the sum of the features of all parts of a model."""
    rows = []
    for part, *widths in _model_parts(shape):
        rows.append(_part_features(part, shape.head_dim, shape.hidden_size, *widths))
    return np.sum(rows, axis=0)


def _model_parts(shape: DecoderShape) -> Iterator[tuple[str, *tuple[float, ...]]]:
    """Yield the name and the widths of each part of a model."""
    yield ("token",)
    yield ("head", shape.vocab_size)
    for layer in shape.present_layers:
        groups = layer.num_key_value_heads
        if groups:
            yield ("attention", groups, layer.num_attention_heads / groups)
        yield ("ffn", layer.intermediate_size) if layer.intermediate_size else ("no_ffn",)


def _fit_conditions(shapes: Sequence[DecoderShape], measured: np.ndarray) -> tuple[np.ndarray, Surcharge]:
    """Return the rates [FEATURES, conditions] and the surcharge, with the best cache size of each condition."""
    num_weights = np.array([shape.num_weights for shape in shapes], float)
    columns = np.array([[*_model_features(shape), 1e-3 * odd_rows(shape)] for shape in shapes])
    tried = np.geomspace(num_weights.min(), num_weights.max() / 2, NUM_CAPACITIES)
    fits = [_fit_condition(columns, num_weights, tried, ms) for ms in measured.T]
    all_rates = np.array([rates for rates, _ in fits]).T
    capacities = np.array([capacity for _, capacity in fits])
    rates = all_rates[: len(FEATURES)]
    odd_ms, spill_ms = all_rates[len(FEATURES) :]
    return rates, Surcharge(capacities, spill_ms, odd_ms)


def _fit_condition(
    columns: np.ndarray, num_weights: np.ndarray, capacities: np.ndarray, ms: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return the rates [FEATURES and SURCHARGES] of one condition, and the cache size in weights."""
    without_spill = _fit(columns, ms)
    fits = []
    for capacity in capacities:
        spilled = np.column_stack([columns, 1e-6 * num_weights * missed(num_weights, capacity)])
        rates = _fit(spilled, ms)
        fits.append((_loss(spilled @ rates, ms), rates, float(capacity)))
    loss, rates, capacity = min(fits, key=lambda fit: fit[0])
    if loss < MAX_SPILL_LOSS * _loss(columns @ without_spill, ms):
        return rates, capacity
    return np.append(without_spill, 0.0), 1.0


def _loss(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Return the sum of squared relative errors, each limited to OUTLIER."""
    errors = np.abs(predicted / measured - 1)
    return float((np.minimum(errors, OUTLIER) ** 2).sum())


def _fit(columns: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return non-negative rates with small relative errors, by iteratively reweighted least squares.

    Models with errors above OUTLIER have less weight in the next pass.
    """
    solve = nnls_solver()
    weights = 1 / measured
    rates = np.zeros(columns.shape[1])
    for _ in range(PASSES):
        rates, _ = solve(columns * weights[:, None], measured * weights, maxiter=MAX_ITERATIONS)
        errors = np.abs(columns @ rates / measured - 1)
        # the root, because the solver squares the weighted errors: beyond OUTLIER they then count as in Huber's loss
        trust = np.minimum(1, OUTLIER / np.maximum(errors, 1e-9))
        weights = np.sqrt(trust) / measured
    return rates
