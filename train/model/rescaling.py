"""Rescale norms so that the function stays the same with fewer channels, or with more zero channels.

RMS. A vector of H channels of which all but H' are zero has the mean square |x|^2/H, and |x|^2/H' without the zeros.
Gains times sqrt(H/H') and eps times H/H' correct this exactly: g sqrt(H/H') x / sqrt(|x|^2/H' + eps H/H') = g x /
sqrt(|x|^2/H + eps). The same holds for added zeros (H' > H), and for norms over all heads of a query or key (width Q).

LayerNorm. It is an RMS norm of x - mean(x). Adding one number to all channels of the stem does not change the output of
a LayerNorm. The stem of H' channels may therefore be centred over itself. Its zeros then change neither sum nor mean,
and the rule above holds with the mean. Two results follow. Removing channels means that the survivors are centred over
the survivors. A model whose channels are only zeroed computes the same if its norms take mean and variance over the
survivors only, the variance as a sum over H. Zeros can be added only to a stem without mean. Everything that writes to
it (embedding, o_proj, down_proj and their biases) is centred over its outputs first, W - 1 (1^T W)/H, which is the same
function.

eps. Norms of the stem have one eps, which is set in the config and scaled there. Norms of q and k over all heads differ
by layer, so their eps stays and their input is scaled instead: RMS(a q; eps) = RMS(q; eps / a^2).

Only zeroing a stem channel is approximate (and, for a LayerNorm, its share of the mean). Imports no torch.
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
"""Name endings of tensors that write to the stem without a norm after them."""
READERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight", HEAD)
"""Name endings of tensors that read the stem."""


def gain_factor(name: str, before: Architecture, after: Architecture) -> float:
    """Return the factor of a norm's gain, sqrt(H/H'); 1 for every other tensor."""
    if not name.endswith("norm.weight"):
        return 1.0
    layer, (axis,) = axes_of(name, before)
    return (axis_size(before, layer, axis) / axis_size(after, layer, axis)) ** 0.5


def qk_input_factor(name: str, before: Architecture, after: Architecture) -> float:
    """Return the factor of q_proj or k_proj that keeps the eps of its norm over all heads; 1 for others."""
    axis = qk_axis(name)
    if before.parts.qk_norm != "width" or axis is None:
        return 1.0
    layer, _ = axes_of(name, before)
    return (axis_size(after, layer, axis) / axis_size(before, layer, axis)) ** 0.5


def qk_axis(name: str) -> str | None:
    """Return the output axis of q_proj or k_proj (weight or bias); None for another tensor."""
    return next((axis for part, axis in QK_AXES.items() if f".{part}_proj." in name), None)


def width_factor(name: str, before: Architecture, after: Architecture) -> float:
    """Return the factor of a tensor between the shapes `before` and `after`."""
    return gain_factor(name, before, after) * qk_input_factor(name, before, after)


def rescaled(name: str, tensor: Any, factor: float, architecture: Architecture) -> Any:
    """Return a stored tensor (torch or numpy) times `factor`, with the offset of a gain considered."""
    offset = architecture.parts.norm.gain_offset if name.endswith("norm.weight") else 0.0
    return tensor * factor if not offset else (tensor + offset) * factor - offset


@dataclass(frozen=True)
class Scales:
    """Numbers in a model's config that change with its widths."""

    stem_eps: float
    qk_eps: float
    """eps of the norms of q and k."""
    stem_gain: float = 1.0
    """Gain of norms that store none."""
    embedding: float = 1.0
    """Factor of the embeddings."""

    @classmethod
    def of(cls, config: Mapping[str, Any], architecture: Architecture) -> Scales:
        """Read the scales of a config.json, irregular or stock."""
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
        """Return the scales in the shape `after`, with the tensors rescaled."""
        ratio = before.hidden_size / after.hidden_size
        gain = self.stem_gain if before.parts.norm.has_gain else self.stem_gain * ratio**0.5
        return Scales(self.stem_eps * ratio, self.qk_eps, gain, self.embedding)

    def stock(self, architecture: Architecture) -> Scales:
        """Return the scales of the stock class of this shape, if its norms are rescaled to these."""
        parts = architecture.parts
        eps = parts.norm.stock_eps or self.stem_eps
        return Scales(eps, qk_eps=eps, embedding=architecture.hidden_size**0.5 if parts.scales_embedding else 1.0)

    def settings(self, architecture: Architecture) -> dict[str, float]:
        """Return their names and values for the config of an irregular model."""
        parts = architecture.parts
        found = {parts.norm.eps_setting: self.stem_eps}
        found |= {"qk_norm_eps": self.qk_eps} if parts.qk_norm else {}
        found |= {} if parts.norm.has_gain else {"norm_scale": self.stem_gain}
        return found | ({"embedding_scale": self.embedding} if parts.scales_embedding else {})


def scale_factor(name: str, have: Scales, want: Scales, architecture: Architecture) -> float:
    """Return the factor of a tensor for a reader with the scales `want` to compute the function of `have`."""
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
    """Return the shape with an untied head if the stock class cannot store the tied one.

    The stock class would need one factor for the matrix as a writer to the stem and another as a reader.
    """
    differs = not architecture.parts.norm.has_gain and have != have.stock(architecture)
    return replace(architecture, tie_word_embeddings=architecture.tie_word_embeddings and not differs)


def is_gain(name: str, architecture: Architecture) -> bool:
    """Tell whether a tensor is a gain over the hidden axis."""
    return name.endswith(".weight") and is_stem_norm(name, architecture)
