"""Describe the shape of a model for training, export and the artefact manifests.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...runtime.base.errors import ModelError
from ...runtime.latency.shape import WIDTHS, LayerShape
from .families import FAMILIES, Family, family_of
from .folder_files import read_json, whole_number

MAX_LAYERS = 10_000


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder with possibly unequal layers."""

    family: str
    """Base model type, a key of FAMILIES."""
    hidden_size: int
    """Stem channels."""
    head_dim: int
    """Channels of one attention head, equal in every layer."""
    vocab_size: int
    tie_word_embeddings: bool
    """Whether the LM head shares the embedding matrix."""
    layers: tuple[LayerShape, ...]

    def __post_init__(self) -> None:
        for name in ("hidden_size", "head_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise ModelError(f"architecture: {name} is {getattr(self, name)}; it must be positive")
        if not self.layers:
            raise ModelError("architecture: there are no layers")
        for index, layer in enumerate(self.layers):
            heads, groups = layer.num_attention_heads, layer.num_key_value_heads
            if (heads == 0) != (groups == 0) or (groups and heads % groups):
                raise ModelError(
                    f"architecture: layer {index} has {heads} query heads over {groups} key/value heads; "
                    "query heads must be a multiple of key/value heads"
                )
            if groups != heads and not self.parts.has_groups:
                raise ModelError(
                    f"architecture: layer {index} has {heads} query heads over {groups} key/value heads; "
                    f"{self.family} needs a key/value head for each query head"
                )
            if min(heads, groups, layer.intermediate_size) < 0:
                raise ModelError(f"architecture: layer {index} has a negative width")

    @property
    def parts(self) -> Family:
        """Return the description of the family's layers."""
        return FAMILIES[self.family]

    @property
    def model_type(self) -> str:
        """Return the Hugging Face model type of the family's stock class."""
        return self.parts.model_type or self.family

    @property
    def widest(self) -> LayerShape:
        """Return the largest of each width over all layers, at least 1, for settings that have one value."""
        return LayerShape(*(max(1, *(getattr(layer, width) for layer in self.layers)) for width in WIDTHS))

    @property
    def is_uniform(self) -> bool:
        """Return True if all layers have one shape."""
        return len(set(self.layers)) == 1

    def attention_parameters(self, layer: LayerShape) -> int:
        """Count the parameters of a layer's attention: projections, biases and norms. Zero without heads."""
        if layer.num_attention_heads == 0:
            return 0
        parts = self.parts
        q, kv = layer.num_attention_heads * self.head_dim, layer.num_key_value_heads * self.head_dim
        biases = (q + 2 * kv) * parts.qkv_bias + self.hidden_size * parts.output_bias
        norms = {"": 0, "head": 2 * self.head_dim, "width": q + kv}[parts.qk_norm]
        return self.hidden_size * (2 * q + 2 * kv) + biases + norms + self._norm_parameters("attention")

    def ffn_parameters(self, layer: LayerShape) -> int:
        """Count the parameters of a layer's FFN: projections, biases and norms. Zero without channels."""
        width, parts = layer.intermediate_size, self.parts
        if width == 0:
            return 0
        biases = ((1 + parts.is_gated) * width + self.hidden_size) * parts.ffn_bias
        return self.hidden_size * (2 + parts.is_gated) * width + biases + self._norm_parameters("ffn")

    def _norm_parameters(self, half: str) -> int:
        """Count the norm parameters of a block (`half`), or of the final norm for an empty string."""
        count = sum(place.endswith(half) for place in self.parts.norms) if half else 1
        return count * self.hidden_size * len(self.parts.norm.tensors)

    @property
    def embedding_parameters(self) -> int:
        """Count the parameters of the token embedding and of an untied LM head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def num_parameters(self) -> int:
        """Count the stored parameters. A tied LM head counts once."""
        layers = sum(self.attention_parameters(layer) + self.ffn_parameters(layer) for layer in self.layers)
        return self.embedding_parameters + layers + self._norm_parameters("")

    def with_layer(self, index: int, **widths: int) -> Architecture:
        """Return the shape with other `widths` (fields of LayerShape) in layer `index`."""
        layers = list(self.layers)
        layers[index] = replace(layers[index], **widths)
        return replace(self, layers=tuple(layers))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, with the layer widths as three parallel lists."""
        return {
            "family": self.family,
            "hidden_size": self.hidden_size,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            **{width: [getattr(layer, width) for layer in self.layers] for width in WIDTHS},
            "num_parameters": self.num_parameters,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Architecture:
        """Read the values of `to_dict`. Raises ModelError for a missing or malformed field."""
        try:
            layers = tuple(LayerShape(*widths) for widths in zip(*(value[width] for width in WIDTHS), strict=True))
            names = ("family", "hidden_size", "head_dim", "vocab_size", "tie_word_embeddings")
            return cls(layers=layers, **{name: value[name] for name in names})
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"architecture: missing or malformed field {error}") from error

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Read a Hugging Face config.json (as a dict), irregular (`per_layer_config`) or uniform.

        Raises ModelError for a part that families.py does not describe.
        """
        family = family_of(config)
        FAMILIES[family].check(config)
        heads = whole_number(config, "num_attention_heads")
        defaults = {
            "num_attention_heads": heads,
            "num_key_value_heads": whole_number(config, "num_key_value_heads", heads),
            "intermediate_size": whole_number(config, "intermediate_size"),
        }
        overrides = layer_overrides(config)
        layers = tuple(
            LayerShape(
                **{name: whole_number(overrides.get(index, {}), name, value) for name, value in defaults.items()}
            )
            for index in range(layer_count(config))
        )
        hidden_size = whole_number(config, "hidden_size")
        return cls(
            family=family,
            hidden_size=hidden_size,
            head_dim=whole_number(config, "head_dim", hidden_size // max(heads, 1)),
            vocab_size=whole_number(config, "vocab_size"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", FAMILIES[family].ties_by_default)),
            layers=layers,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Architecture:
        """Read FOLDER/config.json."""
        return cls.from_hf_config(read_json(folder / "config.json"))


def layer_count(config: Mapping[str, Any], default: int | None = None) -> int:
    """Return num_hidden_layers. Raises ModelError for a number that no model has, before a list of that length."""
    count = whole_number(config, "num_hidden_layers", default)
    if count > MAX_LAYERS:
        raise ModelError(f"config.json: num_hidden_layers is {count}, but must be at most {MAX_LAYERS}")
    return count


def layer_overrides(config: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Return {layer: its own settings} of a config.json; empty for a uniform model."""
    values = config.get("per_layer_config") or {}
    try:
        layers = {int(index): value for index, value in values.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"config.json: per_layer_config is not an object of layer numbers: {error}") from error
    odd = next((index for index, value in layers.items() if not isinstance(value, Mapping)), None)
    if odd is not None:
        raise ModelError(f"config.json: per_layer_config of layer {odd} is {layers[odd]!r}, but must be an object")
    return layers
