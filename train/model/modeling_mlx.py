"""Decoders for mlx-lm whose layers may differ in heads and FFN width.

This file is copied into every irregular checkpoint. `model_file` of config.json names it, and mlx-lm runs it with
--trust-remote-code. It imports only mlx and mlx_lm. Weights have the names of modeling_efficientllm.py.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx  # type: ignore[import-not-found]
from mlx import nn  # type: ignore[import-not-found]
from mlx_lm.models import base, cache, rope_utils  # type: ignore[import-not-found]
from mlx_lm.models.activations import swiglu  # type: ignore[import-not-found]

ROPES = ("default", "linear", "llama3")
"""Values of rope_type whose logits are compared with torch's."""


class OffsetNorm(nn.RMSNorm):
    """RMS norm whose gain is 1 + weight."""

    def __call__(self, x: Any) -> Any:
        return mx.fast.rms_norm(x, 1.0 + self.weight, self.eps)


class PlainNorm(nn.Module):
    """LayerNorm without parameters, times `scale`."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.scale = eps, 1.0

    def __call__(self, x: Any) -> Any:
        return mx.fast.layer_norm(x, None, None, self.eps) * self.scale


@dataclass(frozen=True)
class Family:
    """Parts of one family. The defaults are Llama's."""

    norm: Any = nn.RMSNorm
    eps: str = "rms_norm_eps"
    attention_norms: tuple[str, str] = ("input_layernorm", "")
    """Names of the norms before and after attention; empty if absent."""
    ffn_norms: tuple[str, str] = ("post_attention_layernorm", "")
    qkv_bias: bool = False
    has_biases: bool = False
    """Whether o_proj and the FFN have biases."""
    qk_norm: str = ""
    """Norm of q and k over the channels of each "head", or over the "width" of all heads."""
    activation: Any = swiglu
    """Function of the gate and up projections, or of the latter alone."""
    is_gated: bool = True
    is_parallel: bool = False


FAMILIES = {
    "llama": Family(),
    "llama_bias": Family(qkv_bias=True, has_biases=True),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm="head"),
    "gpt_neox": Family(
        nn.LayerNorm,
        "layer_norm_eps",
        qkv_bias=True,
        has_biases=True,
        activation=nn.gelu,
        is_gated=False,
        is_parallel=True,
    ),
    "olmo": Family(PlainNorm, "layer_norm_eps"),
    "olmo2": Family(
        attention_norms=("", "post_attention_layernorm"), ffn_norms=("", "post_feedforward_layernorm"), qk_norm="width"
    ),
    "smollm3": Family(),
    "gemma3_text": Family(
        OffsetNorm,
        attention_norms=("input_layernorm", "post_attention_layernorm"),
        ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        qk_norm="head",
        activation=lambda gate, up: nn.gelu_approx(gate) * up,
    ),
}


@dataclass
class ModelArgs:
    """Settings of config.json."""

    config: dict[str, Any]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelArgs":
        return cls(config)

    def of_layer(self, index: int) -> dict[str, Any]:
        """Return the settings of a layer, with its rope_parameters and its window (None without)."""
        # transformers writes "07" where a model has ten layers or more
        overrides = {int(key): values for key, values in (self.config.get("per_layer_config") or {}).items()}
        found = {**self.config, **overrides.get(index, {})}
        kind = (found.get("layer_types") or {index: ""})[index]
        if kind != "sliding_attention" and found["model_type"] != "efficientllm_mistral":
            found["sliding_window"] = None
        found["rope_parameters"] = found["rope_parameters"].get(kind, found["rope_parameters"])
        return found


def stem_norm(family: Family, config: dict[str, Any]) -> Any:
    """Return a norm of the residual stream."""
    norm = family.norm(config["hidden_size"], config[family.eps])
    norm.scale = config.get("norm_scale", 1.0)
    return norm


class Attention(nn.Module):
    """Attention of one layer, with its own number of heads."""

    def __init__(self, family: Family, config: dict[str, Any], index: int):
        super().__init__()
        stem, dim, rope = config["hidden_size"], config["head_dim"], config["rope_parameters"]
        if rope.get("rope_type", "default") not in ROPES:
            raise ValueError(f"rope_type {rope['rope_type']!r} is not supported in mlx-lm; use transformers")
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        query_width, key_width = self.heads * dim, self.groups * dim
        self.scale = config.get("query_pre_attn_scalar", dim) ** -0.5
        self.q_proj = nn.Linear(stem, query_width, family.qkv_bias)
        self.k_proj = nn.Linear(stem, key_width, family.qkv_bias)
        self.v_proj = nn.Linear(stem, key_width, family.qkv_bias)
        self.o_proj = nn.Linear(query_width, stem, family.has_biases)
        self.qk_norm = family.qk_norm
        if self.qk_norm:
            eps = config.get("qk_norm_eps") or config[family.eps]
            norms_heads = self.qk_norm == "head"
            self.q_norm = family.norm(dim if norms_heads else query_width, eps)
            self.k_norm = family.norm(dim if norms_heads else key_width, eps)
        rotated = int(dim * rope.get("partial_rotary_factor", 1.0))
        has_rope = (config.get("no_rope_layers") or {index: 1})[index]
        self.rope = rope_utils.initialize_rope(rotated, rope["rope_theta"], False, rope) if has_rope else None

    def __call__(self, x: Any, mask: Any, past: Any) -> Any:
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "width":
            queries, keys = self.q_norm(queries), self.k_norm(keys)

        def split(each: Any, heads: int) -> Any:
            return each.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)  # [B, heads, S, D]

        queries, keys, values = split(queries, self.heads), split(keys, self.groups), split(values, self.groups)
        if self.qk_norm == "head":
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if self.rope is not None:
            offset = past.offset if past is not None else 0
            queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if past is not None:
            keys, values = past.update_and_fetch(keys, values)
        attended = base.scaled_dot_product_attention(queries, keys, values, cache=past, scale=self.scale, mask=mask)
        joined = attended.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        return self.o_proj(joined)


class FeedForward(nn.Module):
    """FFN of one layer, with its own width."""

    def __init__(self, family: Family, config: dict[str, Any]):
        super().__init__()
        stem, width, self.activation = config["hidden_size"], config["intermediate_size"], family.activation
        if family.is_gated:
            self.gate_proj = nn.Linear(stem, width, family.has_biases)
        self.up_proj = nn.Linear(stem, width, family.has_biases)
        self.down_proj = nn.Linear(width, stem, family.has_biases)

    def __call__(self, x: Any) -> Any:
        gates = (self.gate_proj(x),) if "gate_proj" in self else ()
        return self.down_proj(self.activation(*gates, self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention and FFN with their norms. Either block may be absent."""

    def __init__(self, family: Family, config: dict[str, Any], index: int):
        super().__init__()
        self.family, self.window, names = family, config["sliding_window"], ()
        if config["num_attention_heads"]:
            self.self_attn, names = Attention(family, config, index), family.attention_norms
        if config["intermediate_size"]:
            self.mlp, names = FeedForward(family, config), (*names, *family.ffn_norms)
        for name in filter(None, names):
            setattr(self, name, stem_norm(family, config))

    def output(self, block: str, norms: tuple[str, str], x: Any, *state: Any) -> Any:
        """Return what a block adds to the residual stream."""
        before, after = norms
        x = self[block](self[before](x) if before else x, *state)
        return self[after](x) if after else x

    def __call__(self, x: Any, mask: Any, past: Any) -> Any:
        attended = x
        if "self_attn" in self:
            attended = x + self.output("self_attn", self.family.attention_norms, x, mask, past)
        if "mlp" not in self:
            return attended
        return attended + self.output("mlp", self.family.ffn_norms, x if self.family.is_parallel else attended)


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, family: Family, args: ModelArgs):
        super().__init__()
        config = args.config
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = [DecoderLayer(family, args.of_layer(each), each) for each in range(config["num_hidden_layers"])]
        self.norm = stem_norm(family, config)
        stock_scale = config["hidden_size"] ** 0.5 if family.norm is OffsetNorm else 1.0
        self.embedding_scale = config.get("embedding_scale") or stock_scale

    def __call__(self, inputs: Any, pasts: Any) -> Any:
        x = self.embed_tokens(inputs) * self.embedding_scale
        remaining, masks = iter(pasts or ()), {}
        for layer in self.layers:
            past = None
            if "self_attn" in layer:  # a layer without attention has no cache, see make_cache
                past = next(remaining, None)
                if layer.window not in masks:  # layers with the same window share a mask
                    masks[layer.window] = base.create_attention_mask(x, past, window_size=layer.window)
            x = layer(x, masks.get(layer.window), past)
        return self.norm(x)


class Model(nn.Module):
    """Causal LM. Only layers with attention have a cache."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        config = args.config
        self.args, self.model_type = args, config["model_type"]
        self.model = Decoder(FAMILIES[self.model_type.removeprefix("efficientllm_")], args)
        if not config["tie_word_embeddings"]:
            self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def __call__(self, inputs: Any, cache: Any = None) -> Any:
        x = self.model(inputs, cache)
        return self.lm_head(x) if "lm_head" in self else self.model.embed_tokens.as_linear(x)

    @property
    def layers(self) -> Any:
        return self.model.layers

    def make_cache(self) -> list[Any]:
        windows = [layer.window for layer in self.layers if "self_attn" in layer]
        return [cache.RotatingKVCache(window) if window else cache.KVCache() for window in windows]
