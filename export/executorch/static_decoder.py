"""A decoder with static key/value caches inside, as ExecuTorch's LLM runner calls it.

`forward(tokens int64 [1, S], input_pos int64 [1]) -> logits fp32 [1, V]` of the last token. Every layer owns caches of
its own size, [1, C, G_i, D], C slots; layers without attention have none. See decoder_modules for the other letters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...train.model.architecture import Architecture, LayerShape
from ..checkpoint import Checkpoint
from ..decoder_modules import Attention, Decoder


@dataclass(frozen=True)
class Position:
    """Where the new tokens stand."""

    cos: Tensor
    sin: Tensor
    """[S, 1, D]; the minus sign of the half-split rotation lives in the first half."""
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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, position: Position) -> Tensor:
        """Attention of [1, S, Q, D] over the cache and the new keys and values [1, S, G, D] -> [1, S, Q, D]."""
        torch.ops.llama.update_cache(key, self.keys, position.start)
        torch.ops.llama.update_cache(value, self.values, position.start)
        return torch.ops.llama.custom_sdpa(query, self.keys, self.values, position.start, None, 0.0, True)


class PlainCache(FusedCache):
    """Core operators only, for runtimes without ExecuTorch's: attends to all slots, masked."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, position: Position) -> Tensor:
        positions = torch.arange(query.shape[1]) + position.input_pos
        self.keys.index_copy_(1, positions, key)
        self.values.index_copy_(1, positions, value)
        ratio = query.shape[2] // key.shape[2]
        keys, values = (cache.repeat_interleave(ratio, dim=2).transpose(1, 2) for cache in (self.keys, self.values))
        hidden = torch.arange(self.keys.shape[1]) > positions[:, None]
        scores = query.transpose(1, 2) @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(hidden, float("-inf"))
        return (torch.softmax(scores, dim=-1) @ values).transpose(1, 2)


class StaticAttention(Attention):
    """Attention over the layer's own cache."""

    cache: FusedCache

    def forward(self, x: Tensor, context: Position) -> Tensor:
        query, key, value = self.project(x)
        attended = self.cache(self._rotate(query, context), self._rotate(key, context), value, context)
        return self.o_proj(attended.reshape(1, x.shape[1], self.heads * self.head_dim))

    def _rotate(self, x: Tensor, position: Position) -> Tensor:
        half = self.head_dim // 2
        return x * position.cos + torch.cat([x[..., half:], x[..., :half]], -1) * position.sin


class StaticDecoder(Decoder):
    """See the module's docstring."""

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
        """`context`: C, the slots of every cache.

        `custom_ops` needs ExecuTorch's operators registered. `static_length` exports one token per call, for delegates
        without dynamic shapes.
        """
        super().__init__(checkpoint, architecture, dtype)
        self.context, self.static_length = context, static_length
        cache_class = FusedCache if custom_ops else PlainCache
        for module in self.modules():
            if isinstance(module, StaticAttention):
                module.cache = cache_class(context, module.groups, module.head_dim, dtype)
        cos, sin = self.rotary_tables(checkpoint, context)
        self.register_buffer("cos", torch.cat([cos, cos], -1).unsqueeze(1).to(dtype), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], -1).unsqueeze(1).to(dtype), persistent=False)

    def attention(self, layer: LayerShape, qk_norm_eps: float) -> StaticAttention:
        return StaticAttention(self.architecture, layer, qk_norm_eps)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        length = tokens.shape[1]
        if self.static_length:
            cos, sin = (table.index_select(0, input_pos) for table in (self.cos, self.sin))
            position = Position(cos, sin, 0, input_pos)
        else:
            start: Any = input_pos[0].item()  # a SymInt while the program is traced
            torch._check_is_size(start)
            torch._check(start < self.context)
            torch._check(start + length <= self.context)
            cos, sin = self.cos.narrow(0, start, length), self.sin.narrow(0, start, length)
            position = Position(cos, sin, start, input_pos)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, position)
        return self.lm_head(self.norm(x[:, -1])).float()
