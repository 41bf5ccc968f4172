"""A Llama-family decoder with static key/value caches for torch.export, irregular widths included.

Shapes: S new tokens, C cache slots, H hidden, Q query heads, G key/value heads, D head_dim, V vocabulary; batch 1.
`forward(tokens int64 [1, S], input_pos int64 [1]) -> logits fp32 [1, V]` of the last token. Every layer owns caches of
its own size, [1, C, G_i, D]; layers without attention have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..train.architecture import Architecture, LayerShape
from ..train.tensors import tensor_names
from .checkpoint import Checkpoint
from .padding import missing_tensor, pad_tensor, padded_eps
from .rope import rope_tables


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class FusedAttentionCache(nn.Module):
    """ExecuTorch's own operators: the cache is written in place and only its filled part is attended to."""

    def __init__(self, slots: int, groups: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (1, slots, groups, head_dim)
        self.register_buffer("keys", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("values", torch.zeros(shape, dtype=dtype), persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, start: int, input_pos: Tensor) -> Tensor:
        """Attention of [1, S, Q, D] over the cache and the new keys and values [1, S, G, D] -> [1, S, Q, D]."""
        torch.ops.llama.update_cache(key, self.keys, start)
        torch.ops.llama.update_cache(value, self.values, start)
        return torch.ops.llama.custom_sdpa(query, self.keys, self.values, start, None, 0.0, True)


class PlainAttentionCache(FusedAttentionCache):
    """Core operators only, for runtimes without ExecuTorch's: attends to all slots, masked."""

    keys: Tensor
    values: Tensor

    def forward(self, query: Tensor, key: Tensor, value: Tensor, start: int, input_pos: Tensor) -> Tensor:
        positions = torch.arange(query.shape[1]) + input_pos
        self.keys.index_copy_(1, positions, key)
        self.values.index_copy_(1, positions, value)
        ratio = query.shape[2] // key.shape[2]
        keys, values = (cache.repeat_interleave(ratio, dim=2).transpose(1, 2) for cache in (self.keys, self.values))
        hidden = torch.arange(self.keys.shape[1]) > positions[:, None]
        scores = query.transpose(1, 2) @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(hidden, float("-inf"))
        return (torch.softmax(scores, dim=-1) @ values).transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding."""

    def __init__(
        self, architecture: Architecture, layer: LayerShape, cache: nn.Module, qk_norm_eps: float | None
    ) -> None:
        super().__init__()
        hidden, head_dim = architecture.hidden_size, architecture.head_dim
        self.heads, self.groups, self.head_dim = layer.num_attention_heads, layer.num_key_value_heads, head_dim
        self.q_proj = nn.Linear(hidden, self.heads * head_dim, bias=architecture.qkv_bias)
        self.k_proj = nn.Linear(hidden, self.groups * head_dim, bias=architecture.qkv_bias)
        self.v_proj = nn.Linear(hidden, self.groups * head_dim, bias=architecture.qkv_bias)
        self.o_proj = nn.Linear(self.heads * head_dim, hidden, bias=False)
        self.q_norm = RmsNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else nn.Identity()
        self.k_norm = RmsNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else nn.Identity()
        self.cache = cache

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], start: int, input_pos: Tensor) -> Tensor:
        length = x.shape[1]
        query = self._rotate(self.q_norm(self.q_proj(x).view(1, length, self.heads, self.head_dim)), *rotary)
        key = self._rotate(self.k_norm(self.k_proj(x).view(1, length, self.groups, self.head_dim)), *rotary)
        value = self.v_proj(x).view(1, length, self.groups, self.head_dim)
        attended = self.cache(query, key, value, start, input_pos)
        return self.o_proj(attended.reshape(1, length, self.heads * self.head_dim))

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Half-split rotation; the minus sign lives in the first half of `sin`."""
        half = self.head_dim // 2
        return x * cos + torch.cat([x[..., half:], x[..., :half]], -1) * sin


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

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], start: int, input_pos: Tensor) -> Tensor:
        if self.self_attn is not None and self.input_layernorm is not None:
            x = x + self.self_attn(self.input_layernorm(x), rotary, start, input_pos)
        if self.mlp is not None and self.post_attention_layernorm is not None:
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class StaticDecoder(nn.Module):
    """The whole model; parameters carry the checkpoint's names without their "model." prefix."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        context: int,
        *,
        custom_ops: bool = True,
        static_length: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`architecture`: the checkpoint's or a zero-padded one. `context`: C, the slots of every cache.

        `custom_ops` needs ExecuTorch's operators registered. `static_length` exports one token per call, for delegates
        without dynamic shapes. `dtype` is that of weights, activations and caches.
        """
        super().__init__()
        self.context = context
        self.static_length = static_length
        original = checkpoint.architecture
        eps = padded_eps(checkpoint.rms_norm_eps, original, architecture)
        head_eps = checkpoint.qk_norm_eps if architecture.qk_norm else None
        cache_class = FusedAttentionCache if custom_ops else PlainAttentionCache
        hidden, head_dim = architecture.hidden_size, architecture.head_dim
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(architecture.vocab_size, hidden)
            self.layers = nn.ModuleList()
            for shape in architecture.layers:
                attention = None
                if shape.num_attention_heads:
                    with torch.device("cpu"):
                        cache = cache_class(context, shape.num_key_value_heads, head_dim, dtype)
                    attention = Attention(architecture, shape, cache, head_eps)
                self.layers.append(Layer(hidden, eps, attention, shape.intermediate_size))
            self.norm = RmsNorm(hidden, eps)
            self.lm_head = nn.Linear(hidden, architecture.vocab_size, bias=False)
        self._load(checkpoint, architecture, dtype)
        cos, sin = rope_tables(checkpoint.rope, head_dim, context)
        rotary = (torch.from_numpy(cos), torch.from_numpy(sin))
        self.register_buffer("cos", torch.cat([rotary[0]] * 2, -1).unsqueeze(1).to(dtype), persistent=False)
        self.register_buffer("sin", torch.cat([-rotary[1], rotary[1]], -1).unsqueeze(1).to(dtype), persistent=False)
        self.eval().requires_grad_(False)

    def _load(self, checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype) -> None:
        original = checkpoint.architecture
        state: dict[str, Any] = {}
        for name in tensor_names(architecture):
            if checkpoint.has_tensor(name):
                array = pad_tensor(name, checkpoint.tensor(name), original, architecture)
            else:
                array = missing_tensor(name, architecture)
            state[name.removeprefix("model.")] = torch.from_numpy(array).to(dtype)
        if architecture.tie_word_embeddings:
            state["lm_head.weight"] = state["embed_tokens.weight"].clone()  # quantised in another way than the table
        self.load_state_dict(state, assign=True)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        length = tokens.shape[1]
        if self.static_length:
            start: Any = 0
            cos, sin = (table.index_select(0, input_pos) for table in (self.cos, self.sin))
        else:
            start = input_pos[0].item()
            torch._check_is_size(start)
            torch._check(start < self.context)
            torch._check(start + length <= self.context)
            cos, sin = self.cos.narrow(0, start, length), self.sin.narrow(0, start, length)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, (cos, sin), start, input_pos)
        return self.lm_head(self.norm(x[:, -1])).float()
