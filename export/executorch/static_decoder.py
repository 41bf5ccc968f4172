"""A decoder with static key/value caches inside, as ExecuTorch's LLM runner calls it: any family, irregular widths.

`forward(tokens int64 [1, S], input_pos int64 [1]) -> logits fp32 [1, V]` of the last token. Every layer has caches of
its own size, [1, C, G_i, D], with C slots. Layers without attention have none. S new tokens, H hidden, Q query heads, G
key/value heads, D head_dim, V vocabulary. Parameters have the checkpoint's names without the prefix "model.".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...train.model.architecture import Architecture, LayerShape
from ...train.model.attention import LayerAttention
from ...train.model.families import Family, Place
from ...train.model.rescaling import Scales
from ...train.model.rotary import rope_tables
from ...train.model.tensors import block_norms
from ..checkpoint import Checkpoint
from ..padding import padded_scales, padded_tensors


class RmsNorm(nn.Module):
    """RMS norm: x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class Position:
    """Position of the new tokens."""

    rotary: Mapping[str, tuple[Tensor, Tensor]]
    """{rotary_key: cos and sin [S, 1, rotary_dim]}. The first half of the sine has the minus sign of the rotation."""
    start: Any
    """Symbolic integer."""
    input_pos: Tensor


class FusedCache(nn.Module):
    """ExecuTorch's own operators: the cache is written in place and only its filled part is attended to."""

    keys: Tensor
    values: Tensor

    def __init__(self, slots: int, groups: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (1, slots, groups, head_dim)
        self.register_buffer("keys", torch.zeros(shape, dtype=dtype, device="cpu"), persistent=False)
        self.register_buffer("values", torch.zeros(shape, dtype=dtype, device="cpu"), persistent=False)

    def forward(self, qkv: tuple[Tensor, Tensor, Tensor], position: Position, settings: LayerAttention) -> Tensor:
        """Attend with [1, S, Q, D] over the cache and the new keys and values [1, S, G, D] -> [1, S, Q, D]."""
        query, key, value = qkv
        torch.ops.llama.update_cache(key, self.keys, position.start)
        torch.ops.llama.update_cache(value, self.values, position.start)
        mask = None
        if settings.window:  # as a mask of all slots, since the operator has no window
            hidden = self.is_hidden(query.shape[1], position, settings.window)
            mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill(hidden, float("-inf"))
        caches = self.keys, self.values
        return torch.ops.llama.custom_sdpa(
            query, *caches, position.start, mask, 0.0, mask is None, scale=settings.scale
        )

    def is_hidden(self, length: int, position: Position, window: int) -> Tensor:
        """Return bool [S, C]: the slots hidden from each new token."""
        new_positions = torch.arange(length)[:, None] + position.input_pos
        distance = new_positions - torch.arange(self.keys.shape[1])
        # also the slots after the last token: they may hold tokens from before a truncation
        is_later = distance < 0
        return is_later | (distance >= window) if window else is_later


class PlainCache(FusedCache):
    """Core operators only, for runtimes without ExecuTorch's. It attends to all slots with a mask."""

    def forward(self, qkv: tuple[Tensor, Tensor, Tensor], position: Position, settings: LayerAttention) -> Tensor:
        query, key, value = qkv
        positions = torch.arange(query.shape[1]) + position.input_pos
        self.keys.index_copy_(1, positions, key)
        self.values.index_copy_(1, positions, value)
        ratio = query.shape[2] // key.shape[2]
        keys = self.keys.repeat_interleave(ratio, dim=2).transpose(1, 2)
        values = self.values.repeat_interleave(ratio, dim=2).transpose(1, 2)
        hidden = self.is_hidden(query.shape[1], position, settings.window)
        scores = query.transpose(1, 2) @ keys.transpose(2, 3) * settings.scale
        scores = scores.masked_fill(hidden, float("-inf"))
        return (torch.softmax(scores, dim=-1) @ values).transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention over the layer's own cache."""

    cache: FusedCache

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

    def forward(self, x: Tensor, context: Position) -> Tensor:
        query, key, value = self.project(x)
        rotated = self._rotate(query, context), self._rotate(key, context), value
        attended = self.cache(rotated, context, self.settings)
        return self.o_proj(attended.reshape(1, x.shape[1], self.heads * self.head_dim))

    def _rotate(self, x: Tensor, position: Position) -> Tensor:
        if self.settings.rope is None:
            return x
        cos, sin = position.rotary[self.settings.rotary_key]
        width, half = self.settings.rotary_dim, self.settings.rotary_dim // 2
        is_whole = width == self.head_dim
        pairs = x if is_whole else x[..., :width]
        # the first half of the stored sine is negative, so the halves are swapped without a sign
        rotated = pairs * cos + torch.cat([pairs[..., half:], pairs[..., :half]], -1) * sin
        return rotated if is_whole else torch.cat([rotated, x[..., width:]], -1)


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

    def forward(self, x: Tensor, position: Position) -> Tensor:
        after = x
        if self.self_attn is not None:
            attended = self.self_attn(self._norm("before_attention", x), position)
            after = x + self._norm("after_attention", attended)
        if self.mlp is None:
            return after
        read = x if self.parts.is_parallel else after
        return after + self._norm("after_ffn", self.mlp(self._norm("before_ffn", read)))

    def _norm(self, place: Place, x: Tensor) -> Tensor:
        name = self.parts.norms.get(place)
        return x if name is None else getattr(self, name)(x)


class StaticDecoder(nn.Module):
    """Decoder with the interface of the module's docstring."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        context: int,
        *,
        custom_ops: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build the decoder in a shape of the checkpoint's widths or wider, with C = `context` slots in every cache.

        `custom_ops` needs ExecuTorch's operators.
        """
        super().__init__()
        self.architecture, self.context = architecture, context
        self.scales = scales = padded_scales(checkpoint, architecture)
        hidden = architecture.hidden_size
        with torch.device("meta"):  # shapes only: the weights are assigned below, and never exist twice
            self.embed_tokens = nn.Embedding(architecture.vocab_size, hidden)
            self.layers = nn.ModuleList()
            for shape, settings in zip(architecture.layers, checkpoint.attention, strict=True):
                has_attention = shape.num_attention_heads > 0
                attention = Attention(architecture, shape, settings, scales) if has_attention else None
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
        cache_class = FusedCache if custom_ops else PlainCache
        for module in self.modules():
            if isinstance(module, Attention):
                module.cache = cache_class(context, module.groups, module.head_dim, dtype)
        self._store_rotary(checkpoint, dtype)

    def _store_rotary(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Store the tables of every rotary_key, [C, 1, rotary_dim], as buffers, which are constants of the program."""
        ropes = {
            each.rotary_key: (each.rope, each.rotary_dim) for each in checkpoint.attention if each.rope is not None
        }
        self.rotary_keys = tuple(ropes)
        for key, (rope, rotary_dim) in ropes.items():
            cos, sin = (torch.from_numpy(table) for table in rope_tables(rope, rotary_dim, self.context))
            whole_cos = torch.cat([cos, cos], -1)
            whole_sin = torch.cat([-sin, sin], -1)
            self.register_buffer(f"cos_{key}", whole_cos[:, None].to(dtype), persistent=False)
            self.register_buffer(f"sin_{key}", whole_sin[:, None].to(dtype), persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        length = tokens.shape[1]
        start: Any = input_pos[0].item()  # a SymInt while the program is traced
        # torch.export needs these bounds to accept the cut below, whose start is a number of the input
        torch._check_is_size(start)
        torch._check(start < self.context)
        torch._check(start + length <= self.context)
        rotary = {}
        for key in self.rotary_keys:
            cos, sin = getattr(self, f"cos_{key}"), getattr(self, f"sin_{key}")
            rotary[key] = cos.narrow(0, start, length), sin.narrow(0, start, length)
        position = Position(rotary, start, input_pos)
        x = self.embed_tokens(tokens)
        x = x if self.scales.embedding == 1.0 else x * self.scales.embedding
        for layer in self.layers:
            x = layer(x, position)
        return self.lm_head(self.norm(x[:, -1])).float()
