"""What a norm needs so that the same function has fewer channels, or more that are zero. Imports no torch.

RMS. A vector of H channels of which all but H' are zero has the mean square |x|^2/H; without the zeros it is |x|^2/H'.
Gains times sqrt(H/H') and eps times H/H' make up for that exactly:
    g sqrt(H/H') x / sqrt(|x|^2/H' + eps H/H')  =  g x / sqrt(|x|^2/H + eps).
The same holds for zeros that are put in (H' > H), and for norms over all heads of a query or key (width Q).

LayerNorm. It is an RMS norm of x - mean(x), and adding one number to all channels of the stem changes nothing that
reads it through a LayerNorm. So the stem of H' channels may be centred over itself, its zeros then change neither sum
nor mean, and the rule above holds, mean included. Two things follow.
    What taking channels out means: the survivors are centred over the survivors. A model whose channels are only zeroed
    computes just that if its norms take mean and variance over the survivors alone, the variance as a sum over H.
    Zeros can be put in only where the stem has no mean: what writes to it (embedding, o_proj, down_proj, their biases)
    is centred over its outputs first, W - 1 (1^T W)/H, which is the same function.

eps. Norms of the stem have one that is set in the config and scaled there. Norms of q and k over all heads differ by
layer, so theirs stays, and what they read is scaled instead: RMS(a q; eps) = RMS(q; eps / a^2).

What is approximate in removing a stem channel is zeroing it (and, of a LayerNorm, what it gave to the mean), not this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .architecture import Architecture
from .folder_files import positive_number
from .tensors import EMBEDDING, FINAL_NORM, HEAD, axes_of, axis_size, is_stem_norm

QK_AXES = {"q": "query", "k": "kv"}

WRITERS = (EMBEDDING, "self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")
"""Ends of the names of what writes to the stem, where no norm stands behind it."""
READERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight", HEAD)
"""Of what reads it."""


def gain_factor(name: str, before: Architecture, after: Architecture) -> float:
    """What the gain of a norm is multiplied by, sqrt(H/H'); 1 for every other tensor."""
    if not name.endswith("norm.weight"):
        return 1.0
    layer, (axis,) = axes_of(name, before)
    return (axis_size(before, layer, axis) / axis_size(after, layer, axis)) ** 0.5


def qk_input_factor(name: str, before: Architecture, after: Architecture) -> float:
    """What q_proj or k_proj is multiplied by so that the eps of its norm over all heads stays; 1 for every other."""
    axis = qk_axis(name)
    if before.parts.qk_norm != "width" or axis is None:
        return 1.0
    layer, _ = axes_of(name, before)
    return (axis_size(after, layer, axis) / axis_size(before, layer, axis)) ** 0.5


def qk_axis(name: str) -> str | None:
    """The axis that q_proj or k_proj (weight or bias) writes to; None for another tensor."""
    return next((axis for part, axis in QK_AXES.items() if f".{part}_proj." in name), None)


def width_factor(name: str, before: Architecture, after: Architecture) -> float:
    """What a tensor of the model `before` is multiplied by in `after`, where channels went or zeros came."""
    return gain_factor(name, before, after) * qk_input_factor(name, before, after)


def rescaled(name: str, tensor: Any, factor: float, architecture: Architecture) -> Any:
    """A stored tensor (torch's or numpy's) times `factor`; of a gain to which something is added, what gives that."""
    offset = architecture.parts.norm.gain_offset if name.endswith("norm.weight") else 0.0
    return tensor * factor if not offset else (tensor + offset) * factor - offset


@dataclass(frozen=True)
class Scales:
    """Numbers of a model's config that change with its widths."""

    stem_eps: float
    qk_eps: float
    """Of the norms of q and k."""
    stem_gain: float = 1.0
    """Of norms that store none."""
    embedding: float = 1.0
    """What embeddings are multiplied by."""

    @classmethod
    def of(cls, config: Mapping[str, Any], architecture: Architecture) -> Scales:
        """Of a config.json, irregular or stock."""
        norm = architecture.parts.norm
        stem_eps = positive_number(config, norm.eps_setting, norm.stock_eps)
        stock = architecture.hidden_size**0.5
        return cls(
            stem_eps=stem_eps,
            qk_eps=positive_number(config, "qk_norm_eps", stem_eps),
            stem_gain=1.0 if norm.has_gain else positive_number(config, "norm_scale", 1.0),
            embedding=positive_number(config, "embedding_scale", stock) if architecture.parts.scales_embedding else 1.0,
        )

    def at(self, before: Architecture, after: Architecture) -> Scales:
        """In the shape `after`, the tensors being rescaled."""
        ratio = before.hidden_size / after.hidden_size
        gain = self.stem_gain if before.parts.norm.has_gain else self.stem_gain * ratio**0.5
        return Scales(self.stem_eps * ratio, self.qk_eps, gain, self.embedding)

    def stock(self, architecture: Architecture) -> Scales:
        """What the stock class of this shape takes, where its norms are rescaled to these."""
        parts = architecture.parts
        eps = parts.norm.stock_eps or self.stem_eps
        return Scales(eps, qk_eps=eps, embedding=architecture.hidden_size**0.5 if parts.scales_embedding else 1.0)

    def settings(self, architecture: Architecture) -> dict[str, float]:
        """Their names and values in the config of an irregular model."""
        parts = architecture.parts
        found = {parts.norm.eps_setting: self.stem_eps}
        found |= {"qk_norm_eps": self.qk_eps} if parts.qk_norm else {}
        found |= {} if parts.norm.has_gain else {"norm_scale": self.stem_gain}
        return found | ({"embedding_scale": self.embedding} if parts.scales_embedding else {})


def scale_factor(name: str, have: Scales, want: Scales, architecture: Architecture) -> float:
    """What a tensor is multiplied by so that a reader with the scales `want` computes what `have` means."""
    factor = 1.0
    if architecture.parts.qk_norm and qk_axis(name):
        factor *= (want.qk_eps / have.qk_eps) ** 0.5
    if name.endswith(WRITERS):  # the stem as a whole, of which its norms see no factor but in eps
        factor *= (want.stem_eps / have.stem_eps) ** 0.5
    if name.endswith(READERS):
        factor *= have.stem_gain / want.stem_gain
    if name == EMBEDDING:
        factor *= have.embedding / want.embedding
    if name == f"{FINAL_NORM}.weight" and architecture.tie_word_embeddings:
        factor *= want.embedding / have.embedding
    return factor


def untied(architecture: Architecture, have: Scales) -> Architecture:
    """With a head of its own where the stock class could not hold a tied one: it would want one factor as what writes
    to the stem and another as what reads it."""
    differs = not architecture.parts.norm.has_gain and have != have.stock(architecture)
    return replace(architecture, tie_word_embeddings=architecture.tie_word_embeddings and not differs)


def is_gain(name: str, architecture: Architecture) -> bool:
    """Whether a tensor is a gain over the hidden axis."""
    return name.endswith(".weight") and is_stem_norm(name, architecture)
