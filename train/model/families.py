"""What a family's decoder is made of, as data that training, surgery, padding and all exporters read. Imports no torch.

A family of parts that are known here costs one entry of FAMILIES (docs/architecture.md has a worked example). Inside,
every family has Llama's names for its matrices; a checkpoint that calls or fuses them otherwise says so in `StockNames`
and is translated where it is read and where a stock one is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...runtime.base.errors import ModelError

Place = Literal["before_attention", "after_attention", "before_ffn", "after_ffn"]


@dataclass(frozen=True)
class Norm:
    """The normalisation of the stem: RMS, g x / sqrt(mean(x^2) + eps), or LayerNorm, which takes the mean off first."""

    takes_mean: bool = False
    """LayerNorm."""
    has_gain: bool = True
    has_bias: bool = False
    gain_offset: float = 0.0
    """What is added to the stored gain: 1 in Gemma."""
    eps_setting: str = "rms_norm_eps"
    """Of config.json."""
    stock_eps: float | None = None
    """Where the stock class has no such setting: what it takes."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """What is stored of one norm."""
        return ("weight",) * self.has_gain + ("bias",) * self.has_bias


@dataclass(frozen=True)
class StockNames:
    """What stock checkpoints call the tensors that have another name here."""

    renamed: Mapping[str, str]
    """{our name without the layer and ".weight": theirs}; a file may have ours all the same"""
    layers: str
    """Prefix of a layer, before its number."""
    fused: str = ""
    """One matrix of q, k and v, [heads, 3, head_dim] rows; "" where they are apart."""


@dataclass(frozen=True)
class Family:
    """One family. The defaults are Llama."""

    stock_class: str
    """transformers' causal LM."""
    gguf: str
    """llama.cpp architecture of a uniform model."""
    norm: Norm = Norm()
    norms: Mapping[Place, str] = field(
        default_factory=lambda: {"before_attention": "input_layernorm", "before_ffn": "post_attention_layernorm"}
    )
    """Where a layer normalises its stem, and what the module is called there."""
    is_parallel: bool = False
    """Whether attention and FFN both read the layer's input; otherwise the FFN reads what attention left."""
    is_gated: bool = True
    """Whether the FFN has a gate matrix."""
    activation: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"
    """transformers' name of the FFN's activation."""
    activation_setting: str = "hidden_act"
    qkv_bias: bool = False
    output_bias: bool = False
    """Of o_proj."""
    ffn_bias: bool = False
    qk_norm: Literal["", "head", "width"] = ""
    """Whether q and k are RMS-normalised before the rotary embedding, over each head's channels or over all heads'."""
    has_partial_rotary: bool = False
    """Whether the rotary embedding turns a part of each head (partial_rotary_factor of rope_parameters)."""
    has_rotary_layers: bool = False
    """Whether no_rope_layers names layers without rotary embedding."""
    has_window_layers: bool = False
    """Whether layer_types names layers with a sliding window, which have a rotary base of their own."""
    scale_setting: str = ""
    """Setting whose inverse square root multiplies attention scores instead of head_dim's."""
    scales_embedding: bool = False
    """Whether embeddings are multiplied by sqrt(hidden_size)."""
    has_groups: bool = True
    """Whether query heads may share a key/value head in the stock class."""
    heads_fill_hidden: bool = False
    """Whether the stock class has no head_dim: its heads times head_dim are the hidden size."""
    derives_head_dim: bool = False
    """Whether its stock config has no head_dim: readers other than transformers take hidden_size / heads."""
    ties_by_default: bool = False
    """Whether a config.json that does not say so has a tied head."""
    stock_names: StockNames | None = None
    described: Mapping[str, Any] = field(default_factory=dict)
    """Settings that must have this value (or be absent): no part describes another."""

    def check(self, config: Mapping[str, Any]) -> None:
        """ModelError where a config.json asks for what no part describes."""
        name = self.activation_setting
        if config.get(name, self.activation) != self.activation:
            raise ModelError(f"{name}={config[name]!r} is not supported; only {self.activation} is")
        for name, value in {**UNDESCRIBED, **self.described}.items():
            if name in config and config[name] != value and (config[name] or value):
                raise ModelError(
                    f"{name}={config[name]!r} is not supported: no part of train/model/families.py describes it "
                    f"(for this family it must be {value!r})"
                )


UNDESCRIBED: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
"""Settings of any family that must be so unless the family says otherwise."""

MISSING_PARTS = {
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"): "a mixture of experts",
    ("is_encoder_decoder", "num_decoder_layers"): "an encoder with cross-attention",
    ("state_size", "ssm_cfg", "mamba_d_state", "conv_kernel", "conv_L_cache", "time_step_rank"): "a state-space layer",
    ("vision_config", "audio_config"): "a vision or audio tower",
}
"""Settings that give away what no part describes."""

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", gguf="llama"),
    "mistral": Family("MistralForCausalLM", gguf="llama"),
    "qwen2": Family("Qwen2ForCausalLM", gguf="qwen2", qkv_bias=True, derives_head_dim=True),
    "qwen3": Family("Qwen3ForCausalLM", gguf="qwen3", qk_norm="head"),
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
        described={"clip_qkv": None},
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
        scale_setting="query_pre_attn_scalar",
        scales_embedding=True,
        ties_by_default=True,
        described={
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
    ),
}
"""Supported families by Hugging Face model type."""


def family_of(config: Mapping[str, Any]) -> str:
    """The family of a config.json; ModelError, naming the missing part where it can be told, for another one."""
    name = str(config.get("model_type", "")).removeprefix("efficientllm_")
    if name in FAMILIES:
        return name
    missing = [part for settings, part in MISSING_PARTS.items() if any(config.get(setting) for setting in settings)]
    reason = f": no part describes {' and '.join(missing)}" if missing else ""
    raise ModelError(
        f"model type {config.get('model_type')!r} is not supported{reason}; supported: {', '.join(FAMILIES)}"
    )
