"""Describe the decoder of each family as data for training, surgery, padding and all exporters.

Imports no torch. A family of known parts needs one entry of FAMILIES (docs/architecture.md has an example). Inside the
project, every family uses Llama's names for its matrices. `StockNames` translates checkpoints with other or fused names
when they are read or written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...runtime.base.errors import ModelError

Place = Literal["before_attention", "after_attention", "before_ffn", "after_ffn"]


@dataclass(frozen=True)
class Norm:
    """Normalisation of the stem: RMS, g x / sqrt(mean(x^2) + eps), or LayerNorm, which subtracts the mean first."""

    takes_mean: bool = False
    """Whether the mean is subtracted, as in LayerNorm."""
    has_gain: bool = True
    has_bias: bool = False
    gain_offset: float = 0.0
    """Constant added to the stored gain; 1 in Gemma."""
    eps_setting: str = "rms_norm_eps"
    """Name of eps in config.json."""
    stock_eps: float | None = None
    """eps of a stock class without such a setting."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Return the names of the stored tensors of one norm."""
        return ("weight",) * self.has_gain + ("bias",) * self.has_bias


@dataclass(frozen=True)
class StockNames:
    """Names of tensors in stock checkpoints that differ from ours."""

    renamed: Mapping[str, str]
    """{our name without the layer and ".weight": stock name}. A file may use ours as well."""
    layers: str
    """Prefix of a layer name before its number."""
    fused: str = ""
    """Name of a fused q, k and v matrix with [heads, 3, head_dim] rows; empty if they are separate."""


@dataclass(frozen=True)
class Family:
    """Description of one family. The defaults are Llama's."""

    stock_class: str
    """Name of the causal LM class in transformers."""
    gguf: str
    """llama.cpp architecture of a uniform model."""
    model_type: str = ""
    """Hugging Face model type of the stock class if it is not the family's name."""
    norm: Norm = Norm()
    norms: Mapping[Place, str] = field(
        default_factory=lambda: {"before_attention": "input_layernorm", "before_ffn": "post_attention_layernorm"}
    )
    """Places of the norms on the stem, and the module names there."""
    is_parallel: bool = False
    """Whether attention and FFN both read the layer's input. Otherwise the FFN reads the output of the attention."""
    is_gated: bool = True
    """Whether the FFN has a gate matrix."""
    activation: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"
    """Name of the FFN's activation in transformers."""
    activation_setting: str = "hidden_act"
    qkv_bias: bool = False
    output_bias: bool = False
    """Whether o_proj has a bias."""
    ffn_bias: bool = False
    qk_norm: Literal["", "head", "width"] = ""
    """RMS norm of q and k before the rotary embedding: over each head's channels, or over all heads."""
    has_partial_rotary: bool = False
    """Whether the rotary embedding rotates only a part of each head (partial_rotary_factor of rope_parameters)."""
    has_rotary_layers: bool = False
    """Whether no_rope_layers names layers without rotary embedding."""
    has_window_layers: bool = False
    """True if layer_types may name layers with a sliding window."""
    has_window_rope: bool = False
    """True if layers with a sliding window have their own rotary base."""
    scale_setting: str = ""
    """Name of the setting whose inverse square root scales attention scores; head_dim if empty."""
    scales_embedding: bool = False
    """Whether embeddings are multiplied by sqrt(hidden_size)."""
    has_groups: bool = True
    """Whether query heads may share a key/value head in the stock class."""
    heads_fill_hidden: bool = False
    """Whether the stock class has no head_dim, so that heads times head_dim equal the hidden size."""
    derives_head_dim: bool = False
    """Whether the stock config has no head_dim. Other readers then compute hidden_size / heads."""
    ties_by_default: bool = False
    """Default of a tied head if config.json does not say."""
    stock_names: StockNames | None = None
    described: Mapping[str, Any] = field(default_factory=dict)
    """Settings that must have this value or be absent, because no part describes another."""

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise ModelError if a config.json needs a part that is not described."""
        name = self.activation_setting
        if config.get(name, self.activation) != self.activation:
            raise ModelError(f"{name}={config[name]!r} is not supported; only {self.activation} is")
        for name, value in {**UNDESCRIBED, **self.described}.items():
            is_read = name == self.scale_setting
            if not is_read and config.get(name) not in (None, value) and (config[name] or value):
                raise ModelError(
                    f"{name}={config[name]!r} is not supported: no part of train/model/families.py describes it "
                    f"(for this family it must be {value!r})"
                )


BIASES: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
UNDESCRIBED: dict[str, Any] = {
    **BIASES,
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb"), 1.0),
    **dict.fromkeys(("attention_multiplier", "scale_depth", "dim_model_base", "query_pre_attn_scalar", "rope_ratio")),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "logit_soft_cap", "clip_qkv", "qk_clip")),
    **dict.fromkeys(("alibi", "use_alibi", "rope_interleaved", "use_logn_attn", "use_dynamic_ntk", "attention_sinks")),
    **dict.fromkeys(
        ("attn_temperature_tuning", "attention_chunk_size", "use_bidirectional_attention", "parallel_attn")
    ),
}
"""Settings that change the function of other decoders without a tensor, and the value that changes nothing. A family
may require another."""

MISSING_PARTS = {
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"): "a mixture of experts",
    ("is_encoder_decoder", "num_decoder_layers"): "an encoder with cross-attention",
    ("state_size", "ssm_cfg", "mamba_d_state", "conv_kernel", "conv_L_cache", "time_step_rank"): "a state-space layer",
    ("vision_config", "audio_config"): "a vision or audio tower",
}
"""Settings that reveal a part without a description."""

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", gguf="llama"),
    "llama_bias": Family(
        "LlamaForCausalLM",
        gguf="llama",
        model_type="llama",
        qkv_bias=True,
        output_bias=True,
        ffn_bias=True,
        described={"attention_bias": True, "mlp_bias": True},
    ),
    "mistral": Family("MistralForCausalLM", gguf="llama"),
    "qwen2": Family("Qwen2ForCausalLM", gguf="qwen2", qkv_bias=True, has_window_layers=True, derives_head_dim=True),
    "qwen3": Family("Qwen3ForCausalLM", gguf="qwen3", qk_norm="head", has_window_layers=True),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        gguf="gptneox",
        norm=Norm(takes_mean=True, has_bias=True, eps_setting="layer_norm_eps"),
        is_parallel=True,
        is_gated=False,
        activation="gelu",
        qkv_bias=True,
        output_bias=True,
        ffn_bias=True,
        has_partial_rotary=True,
        has_groups=False,
        heads_fill_hidden=True,
        derives_head_dim=True,
        stock_names=StockNames(
            renamed={
                "model.embed_tokens": "gpt_neox.embed_in",
                "model.norm": "gpt_neox.final_layer_norm",
                "lm_head": "embed_out",
                "self_attn.o_proj": "attention.dense",
                "mlp.up_proj": "mlp.dense_h_to_4h",
                "mlp.down_proj": "mlp.dense_4h_to_h",
            },
            layers="gpt_neox.layers",
            fused="attention.query_key_value",
        ),
        described={"attention_bias": True, "use_parallel_residual": True},
    ),
    "olmo": Family(
        "OlmoForCausalLM",
        gguf="olmo",
        norm=Norm(takes_mean=True, has_gain=False, eps_setting="layer_norm_eps", stock_eps=1e-5),
        derives_head_dim=True,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        gguf="olmo2",
        norms={"after_attention": "post_attention_layernorm", "after_ffn": "post_feedforward_layernorm"},
        qk_norm="width",
        derives_head_dim=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        gguf="smollm3",
        has_rotary_layers=True,
        ties_by_default=True,
        described={"use_sliding_window": False},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        gguf="gemma3",
        norm=Norm(gain_offset=1.0),
        norms={
            "before_attention": "input_layernorm",
            "after_attention": "post_attention_layernorm",
            "before_ffn": "pre_feedforward_layernorm",
            "after_ffn": "post_feedforward_layernorm",
        },
        activation="gelu_pytorch_tanh",
        activation_setting="hidden_activation",
        qk_norm="head",
        has_window_layers=True,
        has_window_rope=True,
        scale_setting="query_pre_attn_scalar",
        scales_embedding=True,
        ties_by_default=True,
    ),
}
"""Supported families by Hugging Face model type."""


def family_of(config: Mapping[str, Any]) -> str:
    """Return the family of a config.json. Raises ModelError for an unsupported one, with the missing part if known."""
    name = str(config.get("model_type", "")).removeprefix("efficientllm_")
    if name == "llama" and config.get("attention_bias") and config.get("mlp_bias"):
        return "llama_bias"
    if name in FAMILIES:
        return name
    missing = [part for settings, part in MISSING_PARTS.items() if any(config.get(setting) for setting in settings)]
    reason = f": no part describes {' and '.join(missing)}" if missing else ""
    supported = ", ".join(family for family in FAMILIES if family != "llama_bias")  # a llama to its users
    raise ModelError(f"model type {config.get('model_type')!r} is not supported{reason}; supported: {supported}")
