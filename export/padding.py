"""Exact zero padding: the same function in wider tensors. Imports no torch.

FFN channels: zero rows in gate and up, zero columns in down. Heads: zero rows in q, k, v and zero columns in o. Stem
channels: zeros everywhere; RMSNorm over Hp > H channels of which Hp - H are zero sees a mean square smaller by H/Hp:
gains times sqrt(H/Hp) and eps times H/Hp give the same output:
    g sqrt(H/Hp) x / sqrt(|x|^2/Hp + eps H/Hp)  =  g x / sqrt(|x|^2/H + eps).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..train.model.architecture import FAMILIES, Architecture, LayerShape
from ..train.model.tensors import STEM_NORMS, axes_of, axis_size, tensor_names, tensor_shape
from .checkpoint import Checkpoint


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def pad_rows(architecture: Architecture, multiple: int) -> Architecture:
    """Widths rounded up to `multiple`; head widths are left alone."""
    layers = tuple(
        replace(layer, intermediate_size=round_up(layer.intermediate_size, multiple)) for layer in architecture.layers
    )
    return replace(architecture, hidden_size=round_up(architecture.hidden_size, multiple), layers=layers)


def padding_notes(before: Architecture, after: Architecture) -> tuple[str, ...]:
    """What the user should know about padding; nothing where there is none."""
    if before == after:
        return ()
    widths = sum(a != b for a, b in zip(before.layers, after.layers, strict=True))
    hidden = f"hidden {before.hidden_size} -> {after.hidden_size}, " if before.hidden_size != after.hidden_size else ""
    return (
        f"zero-padded (exact): {hidden}FFN width of {widths} of {len(before.layers)} layers, "
        f"{before.num_parameters:,} -> {after.num_parameters:,} parameters",
    )


def pad_tensor(name: str, array: np.ndarray, before: Architecture, after: Architecture) -> np.ndarray:
    """`array` of a model of shape `before` as the tensor of the same function in shape `after`."""
    layer, axes = axes_of(name)
    for dim, axis in enumerate(axes):
        if axis_size(before, layer, axis) != axis_size(after, layer, axis) or axis == "query":
            array = _pad_axis(array, dim, axis, layer, before, after)
    if before.hidden_size != after.hidden_size and name.endswith(STEM_NORMS):
        array = array * np.float32((before.hidden_size / after.hidden_size) ** 0.5)
    return array


def padded_tensors(checkpoint: Checkpoint, after: Architecture) -> Iterator[tuple[str, np.ndarray]]:
    """(name, fp32 array) of every tensor of the checkpoint's function in shape `after`, in file order."""
    before = checkpoint.architecture
    existing = set(tensor_names(before))
    for name in tensor_names(after):
        if name in existing:
            yield name, pad_tensor(name, checkpoint.tensor(name), before, after)
        else:
            yield name, missing_tensor(name, after)


def padded_eps(eps: float, before: Architecture, after: Architecture) -> float:
    """eps of the norms in shape `after`: it shrinks with the mean square, which zero channels dilute."""
    return eps * before.hidden_size / after.hidden_size


def _pad_axis(
    array: np.ndarray, dim: int, axis: str, layer: int | None, before: Architecture, after: Architecture
) -> np.ndarray:
    if axis != "query":
        widths = [(0, 0)] * array.ndim
        widths[dim] = (0, axis_size(after, layer, axis) - array.shape[dim])
        return np.pad(array, widths)
    assert layer is not None
    old, new = before.layers[layer], after.layers[layer]
    if old == new:
        return array
    # query heads of one key/value group stay together: [G, R, D] grows to [G', R', D]
    moved = np.moveaxis(array, dim, 0)
    grouped = moved.reshape(old.num_key_value_heads, old.queries_per_group, before.head_dim, *moved.shape[1:])
    widths = [
        (0, new.num_key_value_heads - old.num_key_value_heads),
        (0, new.queries_per_group - old.queries_per_group),
        *[(0, 0)] * (grouped.ndim - 2),
    ]
    padded = np.pad(grouped, widths)
    return np.moveaxis(padded.reshape(-1, *moved.shape[1:]), 0, dim)


def missing_tensor(name: str, after: Architecture) -> np.ndarray:
    """A tensor that only the padded model has (attention or FFN of a layer without): zeros, ones for norm gains."""
    shape = tensor_shape(after, name)
    return np.ones(shape, np.float32) if name.endswith("norm.weight") else np.zeros(shape, np.float32)


def uniform_architecture(architecture: Architecture) -> Architecture:
    """The smallest uniform shape that holds every layer and that stock readers accept.

    Stock Llama wants hidden_size to be a multiple of the query heads, and a family whose config has no head_dim wants
    it to be the heads times head_dim.
    """
    layers, hidden, head_dim = architecture.layers, architecture.hidden_size, architecture.head_dim
    groups = max(max(layer.num_key_value_heads for layer in layers), 1)
    ratio = max(max(layer.queries_per_group for layer in layers), 1)
    width = max(max(layer.intermediate_size for layer in layers), 1)
    derives_head_dim = FAMILIES[architecture.family].derives_head_dim
    best: Architecture | None = None
    for num_groups in range(groups, 2 * groups + 1):
        least = max(ratio, -(-hidden // (head_dim * num_groups))) if derives_head_dim else ratio
        for per_group in range(least, 2 * least + 1):
            heads = num_groups * per_group
            candidate = replace(
                architecture,
                hidden_size=heads * head_dim if derives_head_dim else round_up(hidden, heads),
                layers=(LayerShape(heads, num_groups, width),) * len(layers),
            )
            if best is None or candidate.num_parameters < best.num_parameters:
                best = candidate
    assert best is not None
    return best
