"""A table made to agree with whole irregular models: what stacks of equal layers cannot show.

A model of many layers finds less of itself in the caches than a stack of twelve (llama.cpp, Q4_0: up to 20 % dearer).
So a few random models are measured as they are, and every part of the table is scaled, and given an overhead per layer,
such that they come out right: ridge regression of relative errors, for each condition by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ...runtime.latency.grid import Grid
from ...runtime.latency.shape import DecoderShape
from ...runtime.latency.table import LatencyTable

NOISE = 0.02
"""Relative error of one measured model, standard deviation."""
SCALE_PRIOR = {"attention": 0.3, "ffn": 0.3, "head": 0.3, "token": 1.0}
"""How far the scale of a part may be from one, standard deviation."""
OVERHEAD_PRIOR = 0.1
"""Of a layer's attention or FFN, as a share of what a layer takes on average."""


def calibrated(table: LatencyTable, measured_ms: Mapping[DecoderShape, np.ndarray]) -> LatencyTable:
    """The table with its parts scaled to models whose milliseconds [conditions] were measured; as it is without any."""
    if not measured_ms:
        return table
    parts = np.array([_parts(table, shape) for shape in measured_ms])  # [models, parts, conditions]
    counts = np.array([_layers(shape) for shape in measured_ms], float)  # [models, 2]
    measured = np.array(list(measured_ms.values()))
    corrections = np.stack(
        [_correction(parts[:, :, index], counts, measured[:, index]) for index in range(table.num_conditions)], axis=1
    )
    scales: dict[str, np.ndarray] = dict(zip(SCALE_PRIOR, 1 + corrections[: len(SCALE_PRIOR)], strict=True))
    overheads: dict[str, np.ndarray] = dict(zip(("attention", "ffn"), corrections[len(SCALE_PRIOR) :], strict=True))
    one = np.ones(table.num_conditions)
    grids = {
        name: Grid(grid.axes, grid.values * scales.get(name, one) + overheads.get(name, 1 - one))
        for name, grid in table.parts.items()
    }
    return dataclasses.replace(table, parts=grids)


def _parts(table: LatencyTable, shape: DecoderShape) -> np.ndarray:
    """Milliseconds [parts, conditions] of SCALE_PRIOR's parts in a whole model; what absent ones cost counts as FFN."""
    hidden, none = shape.hidden_size, np.zeros(table.num_conditions)
    attention, ffn = none, none
    for layer in shape.present_layers:
        groups, width = layer.num_key_value_heads, layer.intermediate_size
        if groups:
            attention = attention + table.figures("attention", hidden, groups, layer.num_attention_heads / groups)
        ffn = ffn + (table.figures("ffn", hidden, width) if width else table.figures("no_ffn", hidden))
    return np.array([attention, ffn, table.figures("head", hidden, shape.vocab_size), table.figures("token", hidden)])


def _layers(shape: DecoderShape) -> tuple[int, int]:
    """How many layers have attention, and how many an FFN."""
    layers = shape.present_layers
    return sum(layer.num_attention_heads > 0 for layer in layers), sum(layer.intermediate_size > 0 for layer in layers)


def _correction(parts: np.ndarray, counts: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """What to add to the scales of the parts [models, parts], and overheads in ms, for one condition."""
    average = float(parts[:, :2].sum() / max(counts.sum(), 1))
    prior = np.array([*SCALE_PRIOR.values(), *[OVERHEAD_PRIOR * average] * counts.shape[1]])
    features = np.concatenate([parts, counts], axis=1) / measured[:, None] * prior
    missing = 1 - parts.sum(axis=1) / measured
    normal = features.T @ features / NOISE**2 + np.eye(features.shape[1])
    return prior * np.linalg.solve(normal, features.T @ missing / NOISE**2)
