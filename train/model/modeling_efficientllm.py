"""Decoders whose layers may differ in heads and FFN width.

This file is copied into every irregular checkpoint, so that `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` works without efficientllm. It imports only torch and transformers. Layer widths are stored in
transformers' `per_layer_config` schema. Weights keep the names of the base family.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

try:
    import torch
    from torch import nn
except ImportError as error:  # AutoTokenizer, as mlx-lm calls it, ignores this file after OSError (transformers 5.24)
    raise OSError("models of unequal layers need torch; run: pip install torch") from error
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, __version__

try:
    from transformers.integrations.heterogeneity import HeterogeneousConfigMixin  # noqa: F401  config.per_layer_config
except ImportError as error:
    raise ImportError(
        f"layers of unequal width need transformers 5.14 or newer, and this is {__version__}; "
        "run: pip install 'transformers>=5.14' (or use the output of efficientllm-export --target hf-uniform)"
    ) from error
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gpt_neox import configuration_gpt_neox, modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.llama.configuration_llama import LlamaConfig, strict
from transformers.models.mistral import modeling_mistral
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.olmo import modeling_olmo
from transformers.models.olmo.configuration_olmo import OlmoConfig
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.smollm3 import modeling_smollm3
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config

_Base: Any = object  # the mixins stand before a transformers class, which type checkers cannot see


class NoAttention(nn.Module):
    """Attention of a layer without heads. It adds nothing but keeps the length of the KV cache right.

    transformers asks one layer's cache, usually the first one's, for the number of tokens, and treats a cache without
    elements as empty. Each token therefore stores one zero, [B, 1, S, 1].
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
    """FFN of a layer without channels. It adds nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def set_eps(norm: nn.Module, eps: float) -> None:
    """Set eps under either of the two names in transformers' norms."""
    setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", eps)


def stem_config(config: Any) -> Any:
    """Return a copy of a config without the widths of layers.

    transformers' rope functions (yarn, dynamic) read the number of heads even if head_dim is set, and a config with
    unequal layers refuses that.
    """
    stem = copy.copy(config)
    stem.__dict__.pop("_heterogeneity_spec", None)
    return stem


@contextlib.contextmanager
def without_layers(config: Any) -> Iterator[None]:
    """Hide the layers and their widths in this block, in which transformers' own classes build everything else."""
    num_hidden_layers, widths = config.num_hidden_layers, config.__dict__.pop("_heterogeneity_spec", None)
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = num_hidden_layers
        if widths is not None:
            config.__dict__["_heterogeneity_spec"] = widths


class IrregularConfigMixin(_Base):
    """Check each layer's widths instead of the uniform rules (hidden_size need not be a multiple of the heads)."""

    def validate_architecture(self) -> None:
        if self.is_heterogeneous and getattr(self, "head_dim", None) is None:
            raise ValueError("head_dim must be set: it cannot be derived from an irregular model's widths")
        for index, layer in enumerate(self.per_layer_config or ()):  # None: equal layers, transformers 5.14
            heads, groups = layer.num_attention_heads, layer.num_key_value_heads
            if (heads == 0) != (groups == 0) or (groups and heads % groups):
                raise ValueError(f"layer {index}: {heads} query heads are not multiples of {groups} key/value heads")


class IrregularModelMixin(_Base):
    """Build every decoder layer from its own per-layer config."""

    decoder_layer_class: Any
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    ffn_norms: tuple[str, ...] = ("post_attention_layernorm",)
    """Norms around a layer's attention and FFN, which are absent with them."""
    layer_norm_tensors: tuple[str, ...] | None = None
    """Parameters of the stem's norms if they are LayerNorms."""

    def __init__(self, config: Any):
        per_layer = list(config.per_layer_config or [config] * config.num_hidden_layers)
        with without_layers(config):
            super().__init__(config)
        self.rotary_emb.config = stem_config(config)
        self.layers = nn.ModuleList(self.build_layer(layer, index) for index, layer in enumerate(per_layer))
        self.replace_norms(self, ("norm",), config)
        if getattr(config, "embedding_scale", None) is not None:
            self.embed_tokens.scalar_embed_scale = config.embedding_scale
            self.embed_tokens.embed_scale = torch.tensor(config.embedding_scale)
        self.post_init()

    def replace_norms(self, module: nn.Module, names: tuple[str, ...], config: Any) -> None:
        if self.layer_norm_tensors is not None:
            scale = getattr(config, "norm_scale", 1.0)
            for name in names:
                norm = StemLayerNorm(config.hidden_size, config.layer_norm_eps, self.layer_norm_tensors, scale)
                setattr(module, name, norm)

    def build_layer(self, config: Any, index: int) -> nn.Module:
        heads, width = config.num_attention_heads, config.intermediate_size
        if heads == 0:  # built with one head, which is then taken out
            config.num_attention_heads = config.num_key_value_heads = 1
        config.intermediate_size = width or 1
        layer: Any = self.decoder_layer_class(config, index)
        self.replace_norms(layer, self.attention_norms + self.ffn_norms, config)
        if heads == 0:
            config.num_attention_heads = config.num_key_value_heads = 0
            layer.self_attn = NoAttention(index)
        config.intermediate_size = width
        if heads and getattr(config, "qk_norm_eps", None) is not None:
            attention: Any = layer.self_attn
            for norm in (attention.q_norm, attention.k_norm):
                set_eps(norm, config.qk_norm_eps)
        if width == 0:
            layer.mlp = NoFeedForward()
        for name in (() if heads else self.attention_norms) + (() if width else self.ffn_norms):
            setattr(layer, name, nn.Identity())
        return layer


class IrregularCausalLMMixin(_Base):
    """Causal LM around an irregular base model."""

    base_class: Any

    def __init__(self, config: Any):
        with without_layers(config):  # the base class's own decoder is replaced at once
            super().__init__(config)
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


class StemLayerNorm(nn.Module):
    """LayerNorm of [..., H], with or without parameters, that can exclude zeroed channels."""

    def __init__(self, width: int, eps: float, tensors: tuple[str, ...], scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if "weight" in tensors else None
        self.bias = nn.Parameter(torch.zeros(width)) if "bias" in tensors else None
        self.eps, self.scale = eps, scale
        self.survivors: torch.Tensor | None = None
        """Channels of mean and variance (the variance is a sum over H). Other channels become zero."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normalised states, in the shape [..., H] and the type of `hidden_states`."""
        x, width = hidden_states.float(), hidden_states.shape[-1]
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        if self.survivors is None:
            x = nn.functional.layer_norm(x, (width,), weight, bias, self.eps)
        else:
            kept = x.index_select(-1, self.survivors)
            kept = kept - kept.mean(-1, keepdim=True)
            variance = kept.square().sum(-1, keepdim=True) / width
            kept = kept * torch.rsqrt(variance + self.eps)
            x = torch.zeros_like(x).index_copy(-1, self.survivors, kept)
            x = x if weight is None else x * weight
            x = x if bias is None else x + bias
        return (x if self.scale == 1.0 else x * self.scale).type_as(hidden_states)


class GPTNeoXAttention(nn.Module):
    """GPT-NeoX attention with separate q, k and v matrices."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        query_width = config.num_attention_heads * self.head_dim
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width)
        self.k_proj = nn.Linear(config.hidden_size, key_width)
        self.v_proj = nn.Linear(config.hidden_size, key_width)
        self.o_proj = nn.Linear(query_width, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        attention_mask: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        cache = cache if cache is not None else kwargs.pop("past_key_values", None)  # its name before transformers 5.24
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = modeling_gpt_neox.apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        attended, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(attended.reshape(*hidden_states.shape[:-1], -1)), weights


class GPTNeoXFeedForward(nn.Module):
    """FFN that computes down(act(up(x)))."""

    def __init__(self, config: Any):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class GPTNeoXDecoderLayer(GradientCheckpointingLayer):
    """Parallel attention and FFN, each behind its own norm, which the model adds."""

    input_layernorm: Any
    post_attention_layernorm: Any

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.self_attn = GPTNeoXAttention(config, layer_idx)
        self.mlp = GPTNeoXFeedForward(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        return self.mlp(self.post_attention_layernorm(hidden_states)) + attended + hidden_states


class GPTNeoXModel(modeling_llama.LlamaModel):
    """Llama's loop over the layers with GPT-NeoX's partial rotary embedding."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.rotary_emb = modeling_gpt_neox.GPTNeoXRotaryEmbedding(config)


@strict
class EfficientLlamaConfig(IrregularConfigMixin, LlamaConfig):
    model_type = "efficientllm_llama"


@strict
class EfficientLlamaBiasConfig(IrregularConfigMixin, LlamaConfig):
    model_type = "efficientllm_llama_bias"
    attention_bias: bool = True
    mlp_bias: bool = True


@strict
class EfficientMistralConfig(IrregularConfigMixin, MistralConfig):
    model_type = "efficientllm_mistral"


@strict
class EfficientQwen2Config(IrregularConfigMixin, Qwen2Config):
    model_type = "efficientllm_qwen2"
    head_dim: int | None = None


@strict
class EfficientQwen3Config(IrregularConfigMixin, Qwen3Config):
    model_type = "efficientllm_qwen3"
    qk_norm_eps: float | None = None
    """eps of the per-head norms if it differs from rms_norm_eps. Removing stem channels rescales only the latter."""


@strict
class EfficientGPTNeoXConfig(IrregularConfigMixin, configuration_gpt_neox.GPTNeoXConfig):
    model_type = "efficientllm_gpt_neox"
    head_dim: int | None = None
    num_key_value_heads: int | None = None

    @property
    def rms_norm_eps(self) -> float:  # what LlamaModel asks for; its norm is replaced
        return self.layer_norm_eps

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        kwargs.pop("rms_norm_eps", None)
        super().__post_init__(**kwargs)


@strict
class EfficientOlmoConfig(IrregularConfigMixin, OlmoConfig):
    model_type = "efficientllm_olmo"
    layer_norm_eps: float = 1e-5
    norm_scale: float = 1.0
    """Factor of every norm. The norms have no gains, and removing stem channels rescales them."""


@strict
class EfficientOlmo2Config(IrregularConfigMixin, Olmo2Config):
    model_type = "efficientllm_olmo2"
    head_dim: int | None = None
    qk_norm_eps: float | None = None


@strict
class EfficientSmolLM3Config(IrregularConfigMixin, SmolLM3Config):
    model_type = "efficientllm_smollm3"
    head_dim: int | None = None


@strict
class EfficientGemma3TextConfig(IrregularConfigMixin, Gemma3TextConfig):
    model_type = "efficientllm_gemma3_text"
    qk_norm_eps: float | None = None
    embedding_scale: float | None = None
    """Factor of the embeddings: the square root of the hidden size before channels were removed."""


def define(config_class: Any, model: Any, causal_lm: Any, layer: Any, **attributes: Any) -> Any:
    """Return the irregular causal LM of a family, made of its stock classes, and register its base model."""
    name, space = config_class.__name__.removesuffix("Config"), {"__module__": __name__, "config_class": config_class}
    attributes = {**space, "decoder_layer_class": layer, **attributes}
    base = type(f"{name}Model", (IrregularModelMixin, model), attributes)
    whole = type(f"{name}ForCausalLM", (IrregularCausalLMMixin, causal_lm), {**space, "base_class": base})
    globals().update({each.__name__: each for each in (base, whole)})
    return whole


_llama, _mistral, _qwen2, _qwen3 = modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3
_olmo, _olmo2, _smollm3, _gemma3 = modeling_olmo, modeling_olmo2, modeling_smollm3, modeling_gemma3
CAUSAL_LM_CLASSES = {
    "llama": define(EfficientLlamaConfig, _llama.LlamaModel, _llama.LlamaForCausalLM, _llama.LlamaDecoderLayer),
    "llama_bias": define(
        EfficientLlamaBiasConfig, _llama.LlamaModel, _llama.LlamaForCausalLM, _llama.LlamaDecoderLayer
    ),
    "mistral": define(
        EfficientMistralConfig, _mistral.MistralModel, _mistral.MistralForCausalLM, _mistral.MistralDecoderLayer
    ),
    "qwen2": define(EfficientQwen2Config, _qwen2.Qwen2Model, _qwen2.Qwen2ForCausalLM, _qwen2.Qwen2DecoderLayer),
    "qwen3": define(EfficientQwen3Config, _qwen3.Qwen3Model, _qwen3.Qwen3ForCausalLM, _qwen3.Qwen3DecoderLayer),
    "gpt_neox": define(
        EfficientGPTNeoXConfig,
        GPTNeoXModel,
        _llama.LlamaForCausalLM,
        GPTNeoXDecoderLayer,
        layer_norm_tensors=("weight", "bias"),
        _no_split_modules=["GPTNeoXDecoderLayer"],
        _can_record_outputs={"hidden_states": GPTNeoXDecoderLayer, "attentions": GPTNeoXAttention},
    ),
    "olmo": define(
        EfficientOlmoConfig, _olmo.OlmoModel, _olmo.OlmoForCausalLM, _olmo.OlmoDecoderLayer, layer_norm_tensors=()
    ),
    "olmo2": define(
        EfficientOlmo2Config,
        _olmo2.Olmo2Model,
        _olmo2.Olmo2ForCausalLM,
        _olmo2.Olmo2DecoderLayer,
        attention_norms=("post_attention_layernorm",),
        ffn_norms=("post_feedforward_layernorm",),
    ),
    "smollm3": define(
        EfficientSmolLM3Config, _smollm3.SmolLM3Model, _smollm3.SmolLM3ForCausalLM, _smollm3.SmolLM3DecoderLayer
    ),
    "gemma3_text": define(
        EfficientGemma3TextConfig,
        _gemma3.Gemma3TextModel,
        _gemma3.Gemma3ForCausalLM,
        _gemma3.Gemma3DecoderLayer,
        attention_norms=("input_layernorm", "post_attention_layernorm"),
        ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}
"""Irregular causal LM class of each base family."""


def register() -> None:
    """Register the irregular model types with the Auto classes. Idempotent."""
    for causal_lm in CAUSAL_LM_CLASSES.values():
        config = causal_lm.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, causal_lm.base_class, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
