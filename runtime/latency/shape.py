"""The widths that decide how long a decoder takes.

What a device is asked to do: a prompt and its answer, or one token at a depth.
"""

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


EXAMPLE = "give prompt=256,answer=128 (tokens), or depth=512"
FIELDS = {"prompt": "prompt_tokens", "answer": "answer_tokens", "depth": "depth"}


@dataclass(frozen=True)
class Workload:
    """Tokens to evaluate, one sequence at a time."""

    prompt_tokens: int = 0
    """Evaluated at once, from an empty cache."""
    answer_tokens: int = 0
    """Decoded one by one after the prompt."""
    depth: int = 0
    """Tokens already in the cache before the answer, where there is no prompt."""

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.answer_tokens, self.depth) < 0:
            raise UsageError(f"workload {self}: tokens must not be negative; {EXAMPLE}")
        if not self.prompt_tokens and not self.answer_tokens:
            raise UsageError(f"workload {self}: there is nothing to evaluate; {EXAMPLE}")
        if self.prompt_tokens and self.depth:
            raise UsageError(f"workload {self}: a prompt begins with an empty cache; {EXAMPLE}")

    @classmethod
    def at_depth(cls, depth: int) -> Workload:
        """One decoded token after `depth` others: milliseconds per token."""
        return cls(answer_tokens=1, depth=depth)

    @classmethod
    def parse(cls, text: str) -> Workload:
        """ "prompt=256,answer=128" or "depth=512" (one token there); UsageError for anything else."""
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
        """Tokens in the cache when the first token of the answer is evaluated."""
        return self.prompt_tokens or self.depth

    def __str__(self) -> str:
        if self == Workload.at_depth(self.depth):
            return f"depth={self.depth}"
        named = {"prompt": self.prompt_tokens, "answer": self.answer_tokens, "depth": self.depth}
        return ",".join(f"{name}={value}" for name, value in named.items() if value)
