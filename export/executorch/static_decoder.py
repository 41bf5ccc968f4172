"""A decoder with static key/value caches inside, as ExecuTorch's LLM runner calls it.

`forward(tokens int64 [1, S], input_pos int64 [1]) -> logits fp32 [1, V]` of the last token. Every layer has caches of
its own size, [1, C, G_i, D], with C slots. Layers without attention have none. See decoder_modules for the other
letters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...train.model.architecture import Architecture, LayerShape
from ...train.model.attention import LayerAttention
from ..checkpoint import Checkpoint
from ..decoder_modules import Attention, Decoder


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
        """Return attention [1, S, H, D] of queries [1, S, H, D], after keys and values [1, S, K, D] join the cache."""
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


class StaticAttention(Attention):
    """Attention over the layer's own cache."""

    cache: FusedCache

    def forward(self, x: Tensor, context: Position) -> Tensor:
        """Return the attention of x [1, S, hidden] to the cache and to itself, in its shape."""
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


class StaticDecoder(Decoder):
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
        """Build the decoder with C = `context` slots in every cache.

        `custom_ops` needs ExecuTorch's operators.
        """
        super().__init__(checkpoint, architecture, dtype)
        self.context = context
        cache_class = FusedCache if custom_ops else PlainCache
        for module in self.modules():
            if isinstance(module, StaticAttention):
                module.cache = cache_class(context, module.groups, module.head_dim, dtype)
        tables = {}
        for key, (cos, sin) in self.rotary_tables(checkpoint, context).items():
            whole_cos = torch.cat([cos, cos], -1)
            whole_sin = torch.cat([-sin, sin], -1)
            tables[key] = whole_cos[:, None].to(dtype), whole_sin[:, None].to(dtype)
        self.store_rotary(tables)

    def attention(self, layer: LayerShape, settings: LayerAttention) -> StaticAttention:
        return StaticAttention(self.architecture, layer, settings, self.scales)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        length = tokens.shape[1]
        start: Any = input_pos[0].item()  # a SymInt while the program is traced
        # torch.export needs these bounds to accept the cut below, whose start is a number of the input
        torch._check_is_size(start)
        torch._check(start < self.context)
        torch._check(start + length <= self.context)
        rotary = self.stored_rotary(lambda table: table.narrow(0, start, length))
        position = Position(rotary, start, input_pos)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, position)
        return self.lm_head(self.norm(x[:, -1])).float()
