"""The one description of a model's shape, used by training, export and the artefact manifests. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...runtime.base.errors import ModelError
from .folder_files import read_json, whole_number


@dataclass(frozen=True)
class LayerShape:
    """Widths of one decoder layer."""

    num_attention_heads: int
    """Query heads; 0 makes the layer attention-free."""
    num_key_value_heads: int
    """Key/value heads; divides num_attention_heads."""
    intermediate_size: int
    """FFN channels; 0 makes the layer FFN-free."""

    @property
    def queries_per_group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads if self.num_key_value_heads else 0


@dataclass(frozen=True)
class Architecture:
    """Shape of a Llama-family decoder whose layers may differ."""

    family: str
    """Base model type: llama, mistral, qwen2 or qwen3."""
    hidden_size: int
    """Channels of the transformer stem."""
    head_dim: int
    """Channels of one attention head, the same in every layer."""
    vocab_size: int
    tie_word_embeddings: bool
    """Whether the LM head is the embedding matrix."""
    qkv_bias: bool
    """Whether q, k and v projections have biases."""
    qk_norm: bool
    """Whether q and k are RMS-normalised per head before the rotary embedding."""
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
            if min(heads, groups, layer.intermediate_size) < 0:
                raise ModelError(f"architecture: layer {index} has a negative width")

    @property
    def is_uniform(self) -> bool:
        return len(set(self.layers)) == 1

    def attention_parameters(self, layer: LayerShape) -> int:
        """Projections, their biases and norms, and the norm before them; 0 without heads."""
        if layer.num_attention_heads == 0:
            return 0
        q, kv = layer.num_attention_heads * self.head_dim, layer.num_key_value_heads * self.head_dim
        biases = (q + 2 * kv) if self.qkv_bias else 0
        norms = self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return self.hidden_size * (2 * q + 2 * kv) + biases + norms

    def ffn_parameters(self, layer: LayerShape) -> int:
        """Gate, up and down, and the norm before them; 0 without channels."""
        return 0 if layer.intermediate_size == 0 else self.hidden_size * (3 * layer.intermediate_size + 1)

    @property
    def embedding_parameters(self) -> int:
        """Token embedding and, where untied, the LM head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def num_parameters(self) -> int:
        """Stored parameters; a tied LM head counts once."""
        layers = sum(self.attention_parameters(layer) + self.ffn_parameters(layer) for layer in self.layers)
        return self.embedding_parameters + layers + self.hidden_size

    def with_layer(self, index: int, **widths: int) -> Architecture:
        """The shape with other `widths` (fields of LayerShape) in layer `index`."""
        layers = list(self.layers)
        layers[index] = replace(layers[index], **widths)
        return replace(self, layers=tuple(layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; layer widths as three parallel lists."""
        return {
            "family": self.family,
            "hidden_size": self.hidden_size,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            "qkv_bias": self.qkv_bias,
            "qk_norm": self.qk_norm,
            "num_attention_heads": [layer.num_attention_heads for layer in self.layers],
            "num_key_value_heads": [layer.num_key_value_heads for layer in self.layers],
            "intermediate_size": [layer.intermediate_size for layer in self.layers],
            "num_parameters": self.num_parameters,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Architecture:
        """The inverse of to_dict; ModelError where a field is missing or malformed."""
        try:
            layers = tuple(
                LayerShape(heads, groups, width)
                for heads, groups, width in zip(
                    value["num_attention_heads"],
                    value["num_key_value_heads"],
                    value["intermediate_size"],
                    strict=True,
                )
            )
            return cls(
                layers=layers,
                **{
                    name: value[name]
                    for name in (
                        "family",
                        "hidden_size",
                        "head_dim",
                        "vocab_size",
                        "tie_word_embeddings",
                        "qkv_bias",
                        "qk_norm",
                    )
                },
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"architecture: missing or malformed field {error}") from error

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Read a Hugging Face config.json (as a dict), irregular (`per_layer_config`) or uniform.

        Raises ModelError for a family that is not supported.
        """
        family = str(config.get("model_type", "")).removeprefix("efficientllm_")
        if family not in FAMILIES:
            raise ModelError(
                f"model type {config.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}"
            )
        heads = whole_number(config, "num_attention_heads")
        defaults = {
            "num_attention_heads": heads,
            "num_key_value_heads": whole_number(config, "num_key_value_heads", heads),
            "intermediate_size": whole_number(config, "intermediate_size"),
        }
        overrides = _overrides(config)
        layers = tuple(
            LayerShape(
                **{name: whole_number(overrides.get(index, {}), name, value) for name, value in defaults.items()}
            )
            for index in range(whole_number(config, "num_hidden_layers"))
        )
        traits = FAMILIES[family]
        for bias in ("attention_bias", "mlp_bias"):
            if config.get(bias):
                raise ModelError(f"{bias}=true is not supported: biases on o_proj or the FFN have no group to go with")
        if config.get("hidden_act", "silu") != "silu":
            raise ModelError(f"hidden_act={config['hidden_act']!r} is not supported; only silu is")
        hidden_size = whole_number(config, "hidden_size")
        return cls(
            family=family,
            hidden_size=hidden_size,
            head_dim=whole_number(config, "head_dim", hidden_size // max(heads, 1)),
            vocab_size=whole_number(config, "vocab_size"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=traits.qkv_bias,
            qk_norm=traits.qk_norm,
            layers=layers,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Architecture:
        """Read FOLDER/config.json."""
        return cls.from_hf_config(read_json(folder / "config.json"))


def _overrides(config: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """{layer: its own settings} of an irregular config.json; {} of a uniform one."""
    values = config.get("per_layer_config") or {}
    try:
        layers = {int(index): value for index, value in values.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"config.json: per_layer_config is no object of layer numbers: {error}") from error
    odd = next((index for index, value in layers.items() if not isinstance(value, Mapping)), None)
    if odd is not None:
        raise ModelError(f"config.json: per_layer_config of layer {odd} is {layers[odd]!r}, but must be an object")
    return layers


@dataclass(frozen=True)
class FamilyTraits:
    """What distinguishes a family's decoder layer from Llama's."""

    qkv_bias: bool = False
    qk_norm: bool = False
    derives_head_dim: bool = False
    """Whether its stock config has no head_dim: readers other than transformers take hidden_size / heads."""


FAMILIES = {
    "llama": FamilyTraits(),
    "mistral": FamilyTraits(),
    "qwen2": FamilyTraits(qkv_bias=True, derives_head_dim=True),
    "qwen3": FamilyTraits(qk_norm=True),
}
"""Supported families by Hugging Face model type. All share Llama's tensor names."""
