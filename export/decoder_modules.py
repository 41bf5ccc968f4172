"""Parts of traced decoders: a model of any family with irregular widths, without its attention kernel.

S new tokens, H hidden, Q query heads, G key/value heads, D head_dim, V vocabulary. Parameters have the checkpoint's
names without the prefix "model.".
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..train.model.architecture import Architecture, LayerShape
from ..train.model.attention import LayerAttention
from ..train.model.families import Family, Place
from ..train.model.rescaling import Scales
from ..train.model.rotary import rope_tables
from ..train.model.tensors import block_norms
from .checkpoint import Checkpoint
from .padding import padded_scales, padded_tensors


class RmsNorm(nn.Module):
    """RMS norm: x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)  # one operator there
        # ExecuTorch: this formula delegates better than the parts that it would take rms_norm into
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class LayerNorm(nn.Module):
    """LayerNorm over the last axis; `scale` replaces a missing weight."""

    def __init__(self, width: int, parts: Family, scales: Scales) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width)) if parts.norm.has_gain else None
        self.bias = nn.Parameter(torch.empty(width)) if parts.norm.has_bias else None
        self.eps, self.scale = scales.stem_eps, scales.stem_gain

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return normed if self.scale == 1.0 else normed * self.scale


def stem_norm(architecture: Architecture, scales: Scales) -> nn.Module:
    """Return a norm over the hidden axis."""
    parts, width = architecture.parts, architecture.hidden_size
    return LayerNorm(width, parts, scales) if parts.norm.takes_mean else RmsNorm(width, scales.stem_eps)


class Attention(nn.Module):
    """Projections of grouped-query attention. A subclass implements `forward(x [B, S, H], context) -> [B, S, H]`."""

    def __init__(self, architecture: Architecture, layer: LayerShape, settings: LayerAttention, scales: Scales) -> None:
        super().__init__()
        hidden, parts = architecture.hidden_size, architecture.parts
        self.heads, self.groups = layer.num_attention_heads, layer.num_key_value_heads
        self.head_dim = architecture.head_dim
        self.settings = settings
        query_width, key_width = self.heads * self.head_dim, self.groups * self.head_dim
        self.q_proj = nn.Linear(hidden, query_width, bias=parts.qkv_bias)
        self.k_proj = nn.Linear(hidden, key_width, bias=parts.qkv_bias)
        self.v_proj = nn.Linear(hidden, key_width, bias=parts.qkv_bias)
        self.o_proj = nn.Linear(query_width, hidden, bias=parts.output_bias)
        self.norms_heads = parts.qk_norm == "head"
        if parts.qk_norm:
            self.q_norm = RmsNorm(self.head_dim if self.norms_heads else query_width, scales.qk_eps)
            self.k_norm = RmsNorm(self.head_dim if self.norms_heads else key_width, scales.qk_eps)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, S, Q, D], keys and values [B, S, G, D], before the rotary embedding."""
        query = self._normed(self.q_norm, self.q_proj(x), self.heads)
        key = self._normed(self.k_norm, self.k_proj(x), self.groups)
        return query, key, self.v_proj(x).view(*x.shape[:2], self.groups, self.head_dim)

    def _normed(self, norm: nn.Module, x: Tensor, heads: int) -> Tensor:
        """Normalise heads: [B, S, heads * D] -> [B, S, heads, D]."""
        shape = (*x.shape[:2], heads, self.head_dim)
        return norm(x.view(shape)) if self.norms_heads else norm(x).view(shape)


class FeedForward(nn.Module):
    """FFN: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, hidden_size: int, width: int, parts: Family) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=parts.ffn_bias) if parts.is_gated else None
        self.up_proj = nn.Linear(hidden_size, width, bias=parts.ffn_bias)
        self.down_proj = nn.Linear(width, hidden_size, bias=parts.ffn_bias)
        self.activation = ACTIVATIONS[parts.activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def tanh_gelu(x: Tensor) -> Tensor:
    """Compute GELU by its tanh formula."""
    if torch.onnx.is_in_onnx_export():
        return functional.gelu(x, approximate="tanh")
    # ExecuTorch: XNNPACK (of executorch 1.5.1) computes every gelu by the other formula, 5e-4 away
    return 0.5 * x * (1.0 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": tanh_gelu,
}


class Layer(nn.Module):
    """A decoder layer; attention or FFN may be absent."""

    def __init__(self, architecture: Architecture, scales: Scales, attention: Attention | None, width: int) -> None:
        super().__init__()
        self.parts = architecture.parts
        self.self_attn = attention
        self.mlp = FeedForward(architecture.hidden_size, width, self.parts) if width else None
        for half, block in (("attention", self.self_attn), ("ffn", self.mlp)):
            if block is None:  # the checkpoint has no norms of an absent block
                continue
            for name in block_norms(self.parts, half):
                setattr(self, name, stem_norm(architecture, scales))

    def forward(self, x: Tensor, context: Any) -> Tensor:
        after = x
        if self.self_attn is not None:
            attended = self.self_attn(self._norm("before_attention", x), context)
            after = x + self._norm("after_attention", attended)
        if self.mlp is None:
            return after
        read = x if self.parts.is_parallel else after
        return after + self._norm("after_ffn", self.mlp(self._norm("before_ffn", read)))

    def _norm(self, place: Place, x: Tensor) -> Tensor:
        name = self.parts.norms.get(place)
        return x if name is None else getattr(self, name)(x)


class Decoder(nn.Module, abc.ABC):
    """Embedding, layers, head and weights. A subclass implements `attention` and `forward`."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype = torch.float32) -> None:
        """Build the decoder in a shape of the checkpoint's widths or wider, in `dtype`."""
        super().__init__()
        self.architecture = architecture
        self.scales = scales = padded_scales(checkpoint, architecture)
        hidden = architecture.hidden_size
        with torch.device("meta"):  # shapes only: the weights are assigned below, and never exist twice
            self.embed_tokens = nn.Embedding(architecture.vocab_size, hidden)
            self.layers = nn.ModuleList()
            for shape, settings in zip(architecture.layers, checkpoint.attention, strict=True):
                attention = self.attention(shape, settings) if shape.num_attention_heads else None
                self.layers.append(Layer(architecture, scales, attention, shape.intermediate_size))
            self.norm = stem_norm(architecture, scales)
            self.lm_head = nn.Linear(hidden, architecture.vocab_size, bias=False)
        state: dict[str, Any] = {}
        for name, array in padded_tensors(checkpoint, architecture):
            state[name.removeprefix("model.")] = torch.from_numpy(array).to(dtype)
        if architecture.tie_word_embeddings:
            state["lm_head.weight"] = state["embed_tokens.weight"]
        self.load_state_dict(state, assign=True)
        if architecture.tie_word_embeddings:  # load_state_dict wraps it in two parameters
            self.lm_head.weight = self.embed_tokens.weight
        self.eval().requires_grad_(False)

    @abc.abstractmethod
    def attention(self, layer: LayerShape, settings: LayerAttention) -> Attention:
        """Return a layer's attention. Called while the default device is "meta"."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the input of the first layer."""
        x = self.embed_tokens(tokens)
        return x if self.scales.embedding == 1.0 else x * self.scales.embedding

    def rotary_tables(self, checkpoint: Checkpoint, length: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return {rotary_key of a layer: (cos, sin), fp32 [length, rotary_dim / 2]} of every rotary embedding."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for settings in checkpoint.attention:
            if settings.rope is not None and settings.rotary_key not in found:
                cos, sin = rope_tables(settings.rope, settings.rotary_dim, length)
                found[settings.rotary_key] = torch.from_numpy(cos), torch.from_numpy(sin)
        return found

    def store_rotary(self, tables: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Store (cos, sin) of every rotary_key as buffers, which a traced program holds as constants."""
        self.rotary_keys = tuple(tables)
        for key, (cos, sin) in tables.items():
            self.register_buffer(f"cos_{key}", cos, persistent=False)
            self.register_buffer(f"sin_{key}", sin, persistent=False)

    def stored_rotary(self, part: Callable[[Tensor], Tensor] = lambda table: table) -> dict[str, tuple[Tensor, Tensor]]:
        """Return `part` of the stored tables, {rotary_key: (cos, sin)}."""
        found = {}
        for key in self.rotary_keys:
            cos, sin = getattr(self, f"cos_{key}"), getattr(self, f"sin_{key}")
            found[key] = part(cos), part(sin)
        return found
