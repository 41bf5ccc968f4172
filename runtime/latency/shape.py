"""The widths that decide how long a decoder takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..base.errors import UsageError


@dataclass(frozen=True)
class LayerShape:
    """Widths of one decoder layer; 0 where the part is absent."""

    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key/value groups; divides num_attention_heads."""
    intermediate_size: int
    """FFN channels."""

    def __post_init__(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if min(heads, groups, self.intermediate_size) < 0 or (heads == 0) != (groups == 0):
            raise UsageError(f"a layer of {heads} query heads over {groups} key/value groups cannot be priced")
        if groups and heads % groups:
            raise UsageError(f"{heads} query heads are no multiple of {groups} key/value groups")

    @property
    def is_absent(self) -> bool:
        """Whether nothing is left of the layer: exporters leave it out, and it costs nothing."""
        return not self.num_attention_heads and not self.intermediate_size

    def attention_weights(self, hidden_size: int, head_dim: int) -> int:
        """Weights in the four matrices of the attention."""
        return 2 * hidden_size * head_dim * (self.num_attention_heads + self.num_key_value_heads)

    def ffn_weights(self, hidden_size: int) -> int:
        """Weights in the three matrices of the FFN."""
        return 3 * hidden_size * self.intermediate_size


@dataclass(frozen=True)
class DecoderShape:
    """Widths of a whole decoder."""

    hidden_size: int
    """Channels of the stem."""
    head_dim: int
    """Channels of one attention head."""
    vocab_size: int
    """Rows of the LM head."""
    layers: tuple[LayerShape, ...]

    def __post_init__(self) -> None:
        for name in ("hidden_size", "head_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"a decoder with {name} {getattr(self, name)} cannot be priced")

    @classmethod
    def from_dict(cls, architecture: Mapping[str, Any]) -> DecoderShape:
        """Of an architecture's JSON values (Architecture.to_dict), as manifests hold them."""
        names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        layers = zip(*(architecture[name] for name in names), strict=True)
        return cls(
            architecture["hidden_size"],
            architecture["head_dim"],
            architecture["vocab_size"],
            tuple(LayerShape(*widths) for widths in layers),
        )

    @property
    def present_layers(self) -> tuple[LayerShape, ...]:
        """Those of which something is left."""
        return tuple(layer for layer in self.layers if not layer.is_absent)

    @property
    def head_weights(self) -> int:
        """Weights in the LM head."""
        return self.hidden_size * self.vocab_size

    @property
    def num_weights(self) -> int:
        """Weights in all matrices that a token is multiplied with."""
        hidden, head_dim = self.hidden_size, self.head_dim
        layers = (layer.attention_weights(hidden, head_dim) + layer.ffn_weights(hidden) for layer in self.layers)
        return self.head_weights + sum(layers)
