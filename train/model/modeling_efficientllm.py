"""Llama-family models whose layers may differ in heads and FFN width.

This file is copied into every irregular checkpoint, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works without efficientllm installed; it imports
only torch and transformers. Layer widths are stored in transformers' own `per_layer_config` schema. Weights keep the
base family's names.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, __version__

try:
    from transformers.integrations.heterogeneity import HeterogeneousConfigMixin  # noqa: F401  config.per_layer_config
except ImportError as error:
    raise ImportError(
        f"layers of their own width need transformers 5.14 or newer, and this is {__version__}; "
        "run: pip install 'transformers>=5.14' (or take the model as efficientllm-export --target hf-uniform writes it)"
    ) from error
from transformers.models.llama.configuration_llama import LlamaConfig, strict
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM, MistralModel
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model

_Base: Any = object  # the mixins stand before a transformers class, which type checkers cannot see


class NoAttention(nn.Module):
    """Attention of a layer that has no heads: adds nothing, but keeps the KV cache's length right.

    transformers asks one layer's cache, usually the first one's, how many tokens there are, and takes a cache without
    elements for an empty one: so each token leaves one zero, [B, 1, S, 1].
    """

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, cache: Any = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
        cache = cache if cache is not None else kwargs.get("past_key_values")  # its name before transformers 5.24
        if cache is not None:
            mark = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(mark, mark, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """FFN of a layer that has no channels."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class IrregularConfigMixin(_Base):
    """Checks each layer's widths instead of the uniform rules (hidden_size need not be a multiple of the heads)."""

    def validate_architecture(self) -> None:
        if self.is_heterogeneous and getattr(self, "head_dim", None) is None:
            raise ValueError("head_dim must be set: it cannot be derived from an irregular model's widths")
        for index, layer in enumerate(self.per_layer_config or ()):  # None: equal layers, transformers 5.14
            heads, groups = layer.num_attention_heads, layer.num_key_value_heads
            if (heads == 0) != (groups == 0) or (groups and heads % groups):
                raise ValueError(f"layer {index}: {heads} query heads are no multiple of {groups} key/value heads")


class IrregularModelMixin(_Base):
    """Builds every decoder layer from its own per-layer config."""

    decoder_layer_class: Any

    def __init__(self, config: Any):
        num_hidden_layers = config.num_hidden_layers
        per_layer = list(config.per_layer_config or [config] * num_hidden_layers)
        config.num_hidden_layers = 0  # the base class then builds everything but the layers
        super().__init__(config)
        config.num_hidden_layers = num_hidden_layers
        self.layers = nn.ModuleList(self.build_layer(layer, index) for index, layer in enumerate(per_layer))
        self.post_init()

    def build_layer(self, config: Any, index: int) -> nn.Module:
        heads, width = config.num_attention_heads, config.intermediate_size
        if heads == 0:  # built with one head, which is then taken out
            config.num_attention_heads = config.num_key_value_heads = 1
        config.intermediate_size = width or 1
        layer: Any = self.decoder_layer_class(config, index)
        if heads == 0:
            config.num_attention_heads = config.num_key_value_heads = 0
            layer.self_attn = NoAttention(index)
            layer.input_layernorm = nn.Identity()
        config.intermediate_size = width
        if heads and getattr(config, "qk_norm_eps", None) is not None:
            attention: Any = layer.self_attn
            attention.q_norm.variance_epsilon = attention.k_norm.variance_epsilon = config.qk_norm_eps
        if width == 0:
            layer.mlp = NoFeedForward()
            layer.post_attention_layernorm = nn.Identity()
        return layer


class IrregularCausalLMMixin(_Base):
    """A causal LM around an irregular base model."""

    base_class: Any

    def __init__(self, config: Any):
        num_hidden_layers = config.num_hidden_layers
        config.num_hidden_layers = 0  # the base class's own decoder is replaced at once
        per_layer = config.__dict__.pop("_heterogeneity_spec", None)
        super().__init__(config)
        config.num_hidden_layers = num_hidden_layers
        if per_layer is not None:
            config.__dict__["_heterogeneity_spec"] = per_layer
        self.model = self.base_class(config)
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for the attention interface in this file; it is in the base family's

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)
        for layer in self.model.layers:  # each holds its own copy of the config
            if hasattr(layer.self_attn, "config"):
                layer.self_attn.config._attn_implementation = self.config._attn_implementation


@strict
class EfficientLlamaConfig(IrregularConfigMixin, LlamaConfig):
    model_type = "efficientllm_llama"


class EfficientLlamaModel(IrregularModelMixin, LlamaModel):
    config_class = EfficientLlamaConfig
    decoder_layer_class = LlamaDecoderLayer


class EfficientLlamaForCausalLM(IrregularCausalLMMixin, LlamaForCausalLM):
    config_class = EfficientLlamaConfig
    base_class = EfficientLlamaModel


@strict
class EfficientMistralConfig(IrregularConfigMixin, MistralConfig):
    model_type = "efficientllm_mistral"


class EfficientMistralModel(IrregularModelMixin, MistralModel):
    config_class = EfficientMistralConfig
    decoder_layer_class = MistralDecoderLayer


class EfficientMistralForCausalLM(IrregularCausalLMMixin, MistralForCausalLM):
    config_class = EfficientMistralConfig
    base_class = EfficientMistralModel


@strict
class EfficientQwen2Config(IrregularConfigMixin, Qwen2Config):
    model_type = "efficientllm_qwen2"
    head_dim: int | None = None


class EfficientQwen2Model(IrregularModelMixin, Qwen2Model):
    config_class = EfficientQwen2Config
    decoder_layer_class = Qwen2DecoderLayer


class EfficientQwen2ForCausalLM(IrregularCausalLMMixin, Qwen2ForCausalLM):
    config_class = EfficientQwen2Config
    base_class = EfficientQwen2Model


@strict
class EfficientQwen3Config(IrregularConfigMixin, Qwen3Config):
    model_type = "efficientllm_qwen3"
    qk_norm_eps: float | None = None
    """eps of the per-head norms where it differs from rms_norm_eps: removing stem channels rescales only the latter."""


class EfficientQwen3Model(IrregularModelMixin, Qwen3Model):
    config_class = EfficientQwen3Config
    decoder_layer_class = Qwen3DecoderLayer


class EfficientQwen3ForCausalLM(IrregularCausalLMMixin, Qwen3ForCausalLM):
    config_class = EfficientQwen3Config
    base_class = EfficientQwen3Model


CAUSAL_LM_CLASSES = {
    "llama": EfficientLlamaForCausalLM,
    "mistral": EfficientMistralForCausalLM,
    "qwen2": EfficientQwen2ForCausalLM,
    "qwen3": EfficientQwen3ForCausalLM,
}
"""Irregular causal LM class of each base family."""


def register() -> None:
    """Make the Auto classes know the irregular model types; idempotent."""
    for causal_lm in CAUSAL_LM_CLASSES.values():
        config = causal_lm.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, causal_lm.base_class, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
