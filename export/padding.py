"""Exact zero padding: the same function in wider tensors.

FFN channels: zero rows in gate and up, zero columns in down. Heads: zero rows in q, k, v and zero columns in o. Stem
channels: zeros everywhere, and rescaled norms (train/model/rescaling.py). A format may need other scales than the model
has (one eps for all norms, norms without gains, embeddings times sqrt(H)). `stock_scales` returns them, and the factors
move into the neighbouring matrices. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..runtime.base.quantities import round_up
from ..train.model.architecture import Architecture, LayerShape
from ..train.model.rescaling import WRITERS, Scales, is_gain, scale_factor, untied, width_factor
from ..train.model.tensors import EMBEDDING, HEAD, axes_of, axis_size, tensor_names, tensor_shape
from .checkpoint import Checkpoint


def pad_rows(architecture: Architecture, multiple: int) -> Architecture:
    """Return the shape with widths rounded up to `multiple`. Head widths stay."""
    layers = tuple(
        replace(layer, intermediate_size=round_up(layer.intermediate_size, multiple)) for layer in architecture.layers
    )
    return widened(architecture, round_up(architecture.hidden_size, multiple), layers)


def widened(architecture: Architecture, hidden_size: int, layers: tuple[LayerShape, ...]) -> Architecture:
    """Return the shape with other widths. A tied head that must not be centred with the embedding is untied."""
    norm, grows = architecture.parts.norm, hidden_size != architecture.hidden_size
    unties = grows and norm.takes_mean and (norm.has_gain or norm.has_bias)
    tied = architecture.tie_word_embeddings and not unties
    return replace(architecture, hidden_size=hidden_size, layers=layers, tie_word_embeddings=tied)


def padding_notes(before: Architecture, after: Architecture) -> tuple[str, ...]:
    """Return notes on padding for the user, empty without padding."""
    if before == after:
        return ()
    pairs, layers = list(zip(before.layers, after.layers, strict=True)), len(before.layers)
    widths = sum(a.intermediate_size != b.intermediate_size for a, b in pairs)
    heads = sum(a.num_attention_heads != b.num_attention_heads for a, b in pairs)
    changes = []
    if before.hidden_size != after.hidden_size:
        changes.append(f"hidden {before.hidden_size} -> {after.hidden_size}")
    if widths:
        changes.append(f"FFN width of {widths} of {layers} layers")
    if heads:
        changes.append(f"heads of {heads} of {layers} layers")
    return (
        f"zero-padded (exact): {', '.join(changes)}, {before.num_parameters:,} -> {after.num_parameters:,} parameters",
    )


def pad_tensor(name: str, array: np.ndarray, before: Architecture, after: Architecture) -> np.ndarray:
    """Return `array` of the shape `before`, with zeros added for `after`."""
    layer, axes = axes_of(name, before)
    for dim, axis in enumerate(axes):
        # as many query heads may belong to other groups, so they move although their number stays
        if axis == "query" or axis_size(before, layer, axis) != axis_size(after, layer, axis):
            array = _pad_axis(array, dim, axis, layer, before, after)
    return array


def pad_inputs(name: str, values: np.ndarray, before: Architecture, after: Architecture) -> np.ndarray:
    """Return one number per input of a matrix of the shape `before`, with zeros for the further inputs of `after`."""
    layer, axes = axes_of(name, before)
    return _pad_axis(values, 0, axes[1], layer, before, after)


def padded_scales(checkpoint: Checkpoint, after: Architecture) -> Scales:
    """Return the scales of the checkpoint's function in shape `after`."""
    return checkpoint.scales.at(checkpoint.architecture, after)


def stock_scales(checkpoint: Checkpoint, after: Architecture) -> Scales:
    """Return the scales of the family's stock class in shape `after`."""
    return padded_scales(checkpoint, after).stock(after)


def stock_architecture(checkpoint: Checkpoint) -> Architecture:
    """Return the uniform shape of the stock class."""
    uniform = uniform_architecture(checkpoint.architecture)
    return untied(uniform, padded_scales(checkpoint, uniform))


def padded_tensors(
    checkpoint: Checkpoint, after: Architecture, scales: Scales | None = None, is_centred: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, fp32 array) of every tensor of the checkpoint's function in shape `after`, in file order.

    `scales` are the reader's, by default padded_scales. `is_centred` removes the mean of the stem.
    """
    before, have = checkpoint.architecture, padded_scales(checkpoint, after)
    takes_mean = before.parts.norm.takes_mean
    # zeros can be added only to a stem without a mean (train/model/rescaling.py)
    is_centred = takes_mean and (is_centred or before.hidden_size != after.hidden_size)
    existing = set(tensor_names(before))
    for name in tensor_names(after):
        source = EMBEDDING if name == HEAD and before.tie_word_embeddings else name
        if source not in existing:
            # only the padded model has it: zeros, or ones for norm gains
            value = float(name.endswith("norm.weight")) * (have.stem_gain if is_gain(name, after) else 1.0)
            yield name, np.full(tensor_shape(after, name), value, np.float32)
            continue
        array = checkpoint.tensor(source)
        if is_centred and name.endswith(WRITERS):
            array = _centred(array, source, before)
        factor = width_factor(name, before, after) * scale_factor(name, have, scales or have, after)
        array = pad_tensor(name, array, before, after)
        yield name, array if factor == 1.0 else array * np.float32(factor)


def _centred(array: np.ndarray, name: str, before: Architecture) -> np.ndarray:
    """Return a tensor that writes to the stem without the mean over its outputs."""
    axis = axes_of(name, before)[1].index("hidden")
    return array - array.mean(axis, keepdims=True, dtype=np.float64).astype(np.float32)


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
    widths = [(0, 0)] * grouped.ndim
    widths[0] = (0, new.num_key_value_heads - old.num_key_value_heads)
    widths[1] = (0, new.queries_per_group - old.queries_per_group)
    padded = np.pad(grouped, widths).reshape(-1, *moved.shape[1:])
    return np.moveaxis(padded, 0, dim)


def uniform_architecture(architecture: Architecture, multiple: int = 1) -> Architecture:
    """Return the smallest uniform shape that contains every layer and that stock readers accept.

    Its hidden size is a multiple of `multiple`. Stock Llama needs hidden_size to be a multiple of the query heads, and
    a family without head_dim in its config needs it to be the heads times head_dim. If the stock class has no groups,
    every head has its own keys and values.
    """
    layers, hidden, head_dim = architecture.layers, architecture.hidden_size, architecture.head_dim
    groups, width = architecture.widest.num_key_value_heads, architecture.widest.intermediate_size
    # padded heads keep their group, so the most groups and the most heads of a group count, not the most heads
    ratio = max(max(layer.queries_per_group for layer in layers), 1)
    derives_head_dim, has_groups = architecture.parts.derives_head_dim, architecture.parts.has_groups
    if not has_groups:
        groups = max(groups, -(-hidden // head_dim) if derives_head_dim else 1)
    best: Architecture | None = None
    # among `multiple` successive numbers of heads, one makes the hidden size a multiple
    for num_groups in range(groups, max(2 * groups, groups + multiple) + 1):
        least = ratio
        if derives_head_dim:
            least = max(ratio, -(-hidden // (head_dim * num_groups)))
        numbers = range(least, max(2 * least, least + multiple) + 1) if has_groups else (1,)
        for per_group in numbers:
            heads = num_groups * per_group
            size = heads * head_dim if derives_head_dim else round_up(hidden, math.lcm(heads, multiple))
            if size % multiple:
                continue
            if best is not None and size >= best.hidden_size and heads >= best.layers[0].num_attention_heads:
                continue  # no fewer groups either, so no fewer parameters
            candidate = widened(architecture, size, (LayerShape(heads, num_groups, width),) * len(layers))
            if best is None or candidate.num_parameters < best.num_parameters:
                best = candidate
    assert best is not None
    return best
