"""Compare what the exporters read from a folder with what transformers builds from it.

The two readers share no code: rotary tables, windows, scales, eps and tensors are taken from the modules of the loaded
model. S sample tokens, D rotated channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..runtime.base.errors import ArtefactError
from ..train.model.attention import FULL, WINDOW, LayerAttention
from ..train.model.rotary import rope_tables
from ..train.model.target_rules import ROPES
from ..train.model.tensors import stock_tensor, tensor_names
from .checkpoint import Checkpoint

ANGLE_ERROR = 1e-6
"""Error of an angle per position, in radians. Torch's frequencies are fp32, and the largest is 1."""

Finding = tuple[str, Any, Any]
"""(what was read, its value here, its value in transformers)"""


def check_reading(checkpoint: Checkpoint, model: Any, length: int) -> None:
    """Raise ArtefactError if the exporters read another model than `model`, which transformers loaded.

    `length` is the number S of positions of which rotary tables are compared.
    """
    for name, ours, theirs in _findings(checkpoint, model, length):
        is_same = ours == theirs
        if isinstance(ours, float) and isinstance(theirs, int | float):
            is_same = math.isclose(ours, theirs, rel_tol=1e-5)
        if not is_same:
            raise ArtefactError(
                f"{checkpoint.name}: {name} is read as {ours}, but transformers computes with {theirs}; nothing was "
                "written. Please report this model"
            )


def _findings(checkpoint: Checkpoint, model: Any, length: int) -> Iterator[Finding]:
    shape, base = checkpoint.architecture, model.base_model
    yield "the number of layers", len(shape.layers), len(base.layers)
    yield "the number of parameters", shape.num_parameters, sum(each.numel() for each in model.parameters())
    if not shape.parts.has_window_layers and getattr(model.config, "sliding_window", None):
        context = checkpoint.context_length
        yield "the context", context, min(context, model.config.sliding_window)
    for index, (layer, ours) in enumerate(zip(base.layers, checkpoint.attention, strict=True)):
        attention = getattr(layer, "self_attn", None) or layer.attention
        if shape.layers[index].num_attention_heads:
            yield from _of_layer(f"layer {index}: the", ours, attention, base.rotary_emb, length)
            groups = shape.layers[index].queries_per_group
            yield f"layer {index}: the heads of a group", groups, getattr(attention, "num_key_value_groups", 1)
    scales = checkpoint.scales
    for name, module in model.named_modules():
        if name.endswith("norm") and not isinstance(module, torch.nn.Identity):
            eps = scales.qk_eps if name.endswith(("q_norm", "k_norm")) else scales.stem_eps
            yield f"eps of {name}", eps, _measured_eps(module, eps, shape.hidden_size)
            yield f"the factor of {name}", scales.stem_gain, getattr(module, "scale", 1.0)
    factor = getattr(base.get_input_embeddings(), "scalar_embed_scale", 1.0)
    yield "the factor of the embedding", scales.embedding, float(factor)
    yield from _of_tensors(checkpoint, model)


def _measured_eps(norm: Any, expected: float, hidden_size: int) -> float:
    """Return eps of a norm, of which one family has no attribute, from a small and a large input of one direction."""
    weight = getattr(norm, "weight", None)
    width = hidden_size if weight is None else len(weight)
    inputs = torch.zeros(2, width)  # of mean zero, and the mean square of the small one is the expected eps
    inputs[:, 0] = torch.tensor([(expected * width / 2) ** 0.5, 1e6])
    inputs[:, 1] = -inputs[:, 0]
    with torch.inference_mode():
        small, large = (norm(inputs) - norm(-inputs)).abs().amax(1).double()
    return expected * (float(large / small) ** 2 - 1)


def _of_layer(name: str, ours: LayerAttention, attention: Any, rotary: Any, length: int) -> Iterator[Finding]:
    yield f"{name} scale of the scores", ours.scale, attention.scaling
    if hasattr(attention, "sliding_window"):
        yield f"{name} window", ours.window, attention.sliding_window or 0
    has_rope = bool(getattr(attention, "use_rope", True))
    yield f"{name} rotary embedding", ours.rope is not None, has_rope
    if ours.rope is None or ours.rope["rope_type"] not in ROPES:
        return  # others are only copied to a reader that is transformers as well
    frequencies = frequencies_of(rotary, WINDOW if ours.window else FULL)
    yield f"{name} number of rotated channels", ours.rotary_dim, 2 * len(frequencies)
    angles = torch.arange(length).double()[:, None] * frequencies  # [S, D / 2]
    for kind, table, exact in zip(
        ("cosines", "sines"), rope_tables(ours.rope, ours.rotary_dim, length), (angles.cos(), angles.sin()), strict=True
    ):
        distance = float(np.abs(table - exact.numpy()).max(initial=0.0))
        yield f"{name} {kind} of {ours.rope}", min(distance, ANGLE_ERROR * length), distance


def frequencies_of(rotary: Any, kind: str) -> torch.Tensor:
    """Return torch's own frequencies of layers of a kind, fp64 [D / 2]."""
    own = getattr(rotary, f"{kind}_inv_freq", None)  # of a family with two ropes
    return (rotary.inv_freq if own is None else own).double()


def _of_tensors(checkpoint: Checkpoint, model: Any) -> Iterator[Finding]:
    """Yield whether each tensor has torch's values."""
    shape, stored = checkpoint.architecture, model.state_dict()
    for name in tensor_names(shape):
        place = stock_tensor(shape, name)
        if name in stored:
            theirs = stored[name]
        else:  # q, k or v of a fused matrix is a third of each head's rows
            theirs = stored[place.name]
            if place.part is not None:
                theirs = theirs.unflatten(0, (-1, 3 * shape.head_dim)).chunk(3, 1)[place.part].flatten(0, 1)
        if name.endswith("norm.weight"):
            theirs = theirs + shape.parts.norm.gain_offset
        is_same = np.array_equal(checkpoint.tensor(name), theirs.numpy())
        yield f"tensor {name}", "other numbers" if not is_same else "", ""
