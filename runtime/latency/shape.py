"""Decoder widths that determine its time, and the workload: a prompt with its answer, or one token at a depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..base.errors import UsageError


@dataclass(frozen=True)
class LayerShape:
    """Widths of one decoder layer, in training, in files and on devices."""

    num_attention_heads: int
    """Query heads; 0 if the layer has no attention."""
    num_key_value_heads: int
    """Key/value heads; a divisor of num_attention_heads."""
    intermediate_size: int
    """FFN channels; 0 if the layer has no FFN."""

    @property
    def queries_per_group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads if self.num_key_value_heads else 0

    @property
    def is_absent(self) -> bool:
        """Tell whether the layer has no blocks. Exporters leave it out."""
        return not self.num_attention_heads and not self.intermediate_size

    def attention_weights(self, hidden_size: int, head_dim: int) -> int:
        """Count the weights of the attention's four matrices."""
        return 2 * hidden_size * head_dim * (self.num_attention_heads + self.num_key_value_heads)

    def ffn_weights(self, hidden_size: int) -> int:
        """Count the weights of the FFN's three matrices."""
        return 3 * hidden_size * self.intermediate_size


WIDTHS = tuple(field.name for field in fields(LayerShape))
"""Names of a layer's widths, as in config.json."""


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
                raise UsageError(f"a decoder with {name} {getattr(self, name)} has no predicted time")
        for layer in self.layers:
            heads, groups = layer.num_attention_heads, layer.num_key_value_heads
            if min(heads, groups, layer.intermediate_size) < 0 or (heads == 0) != (groups == 0):
                raise UsageError(f"a layer of {heads} query heads over {groups} key/value groups has no predicted time")
            if groups and heads % groups:
                raise UsageError(f"{heads} query heads are not multiples of {groups} key/value groups")

    @classmethod
    def from_dict(cls, architecture: Mapping[str, Any]) -> DecoderShape:
        """Read an architecture's JSON values (Architecture.to_dict), as stored in manifests."""
        layers = zip(*(architecture[name] for name in WIDTHS), strict=True)
        return cls(
            architecture["hidden_size"],
            architecture["head_dim"],
            architecture["vocab_size"],
            tuple(LayerShape(*widths) for widths in layers),
        )

    @property
    def present_layers(self) -> tuple[LayerShape, ...]:
        """Return the layers with at least one block."""
        return tuple(layer for layer in self.layers if not layer.is_absent)

    @property
    def head_weights(self) -> int:
        """Count the weights of the LM head."""
        return self.hidden_size * self.vocab_size

    @property
    def num_weights(self) -> int:
        """Count the weights of all matrices that multiply a token."""
        hidden, head_dim = self.hidden_size, self.head_dim
        layers = (layer.attention_weights(hidden, head_dim) + layer.ffn_weights(hidden) for layer in self.layers)
        return self.head_weights + sum(layers)


EXAMPLE = "give prompt=256,answer=128 (tokens), or depth=512"
FIELDS = {"prompt": "prompt_tokens", "answer": "answer_tokens", "depth": "depth"}


@dataclass(frozen=True)
class Workload:
    """Tokens to evaluate, one sequence at a time."""

    prompt_tokens: int = 0
    """Tokens evaluated at once from an empty cache."""
    answer_tokens: int = 0
    """Tokens decoded one by one after the prompt."""
    depth: int = 0
    """Tokens in the cache before the answer if there is no prompt."""

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.answer_tokens, self.depth) < 0:
            raise UsageError(f"workload {self}: tokens must not be negative; {EXAMPLE}")
        if not self.prompt_tokens and not self.answer_tokens:
            raise UsageError(f"workload {self}: it has no tokens to evaluate; {EXAMPLE}")
        if self.prompt_tokens and self.depth:
            raise UsageError(f"workload {self}: a prompt begins with an empty cache; {EXAMPLE}")

    @classmethod
    def at_depth(cls, depth: int) -> Workload:
        """Return the workload of one decoded token after `depth` others."""
        return cls(answer_tokens=1, depth=depth)

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Parse "prompt=256,answer=128" or "depth=512" (one token). Raises UsageError otherwise."""
        values: dict[str, int] = {}
        for part in text.split(","):
            name, _, number = (piece.strip() for piece in part.partition("="))
            if name not in FIELDS or FIELDS[name] in values or not number.isdecimal():
                raise UsageError(f"workload {text!r}: cannot read {part.strip()!r}; {EXAMPLE}")
            values[FIELDS[name]] = int(number)
        if "depth" in values:
            values.setdefault("answer_tokens", 1)
        return cls(**values)

    @property
    def first_depth(self) -> int:
        """Return the tokens in the cache when the first token of the answer is evaluated."""
        return self.prompt_tokens or self.depth

    def __str__(self) -> str:
        if self == Workload.at_depth(self.depth):
            return f"depth={self.depth}"
        named = {"prompt": self.prompt_tokens, "answer": self.answer_tokens, "depth": self.depth}
        return ",".join(f"{name}={value}" for name, value in named.items() if value)
