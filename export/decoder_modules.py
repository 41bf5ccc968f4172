"""Parts of the decoders that we trace: a Llama-family model with irregular widths, without its attention kernel.

S new tokens, H hidden, Q query heads, G key/value heads, D head_dim, V vocabulary. Parameters carry the checkpoint's
names without their "model." prefix.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..train.model.architecture import Architecture, LayerShape
from .checkpoint import Checkpoint
from .padding import padded_eps, padded_tensors
from .rope import rope_tables


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)  # one operator there
        # ExecuTorch: this formula delegates better than the parts that it would take rms_norm into
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Projections of grouped-query attention; a subclass attends in `forward(x [B, S, H], context) -> [B, S, H]`."""

    def __init__(self, architecture: Architecture, layer: LayerShape, qk_norm_eps: float) -> None:
        super().__init__()
        hidden, head_dim = architecture.hidden_size, architecture.head_dim
        self.heads, self.groups, self.head_dim = layer.num_attention_heads, layer.num_key_value_heads, head_dim
        self.q_proj = nn.Linear(hidden, self.heads * head_dim, bias=architecture.qkv_bias)
        self.k_proj = nn.Linear(hidden, self.groups * head_dim, bias=architecture.qkv_bias)
        self.v_proj = nn.Linear(hidden, self.groups * head_dim, bias=architecture.qkv_bias)
        self.o_proj = nn.Linear(self.heads * head_dim, hidden, bias=False)
        self.q_norm = RmsNorm(head_dim, qk_norm_eps) if architecture.qk_norm else nn.Identity()
        self.k_norm = RmsNorm(head_dim, qk_norm_eps) if architecture.qk_norm else nn.Identity()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, Q, D], keys and values [B, S, G, D], before the rotary embedding."""
        batch, length, _ = x.shape
        query = self.q_norm(self.q_proj(x).view(batch, length, self.heads, self.head_dim))
        key = self.k_norm(self.k_proj(x).view(batch, length, self.groups, self.head_dim))
        return query, key, self.v_proj(x).view(batch, length, self.groups, self.head_dim)


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer; either half may be absent."""

    def __init__(self, hidden_size: int, eps: float, attention: Attention | None, width: int) -> None:
        super().__init__()
        self.self_attn = attention
        self.input_layernorm = RmsNorm(hidden_size, eps) if attention is not None else None
        self.mlp = FeedForward(hidden_size, width) if width else None
        self.post_attention_layernorm = RmsNorm(hidden_size, eps) if width else None

    def forward(self, x: Tensor, context: Any) -> Tensor:
        if self.self_attn is not None and self.input_layernorm is not None:
            x = x + self.self_attn(self.input_layernorm(x), context)
        if self.mlp is not None and self.post_attention_layernorm is not None:
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module, abc.ABC):
    """Embedding, layers, head and weights; a subclass provides `attention` and `forward`."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype = torch.float32) -> None:
        """`architecture`: the checkpoint's or a zero-padded one; `dtype`: of weights and activations."""
        super().__init__()
        self.architecture = architecture
        eps = padded_eps(checkpoint.rms_norm_eps, checkpoint.architecture, architecture)
        hidden = architecture.hidden_size
        with torch.device("meta"):  # shapes only: the weights are assigned below, and never exist twice
            self.embed_tokens = nn.Embedding(architecture.vocab_size, hidden)
            self.layers = nn.ModuleList()
            for shape in architecture.layers:
                attention = self.attention(shape, checkpoint.qk_norm_eps) if shape.num_attention_heads else None
                self.layers.append(Layer(hidden, eps, attention, shape.intermediate_size))
            self.norm = RmsNorm(hidden, eps)
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
    def attention(self, layer: LayerShape, qk_norm_eps: float) -> Attention:
        """A layer's attention, called while the default device is "meta"."""

    def rotary_tables(self, checkpoint: Checkpoint, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), fp32 [length, D / 2]."""
        cos, sin = rope_tables(checkpoint.rope, self.architecture.head_dim, length)
        return torch.from_numpy(cos), torch.from_numpy(sin)
