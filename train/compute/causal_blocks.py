"""Causal attention in blocks of queries, for CPUs on which torch's own kernel is slow.

torch's kernel leaves its products to MKL, which has no fast ones for AMD. Forward and backward pass of a layer of
SmolLM2-135M take 19.4 ms there and 8.8 ms here (2 x 256 tokens in bf16, one core; 18.0 and 16.1 ms in fp32).

Shapes: B sequences, H query heads, K key/value heads, G = H / K, S tokens, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CAUSAL_BLOCKS = "causal-blocks"
"""Name of this attention in transformers."""

BLOCK = 64
"""Queries of a block. Their scores stay in the cache of a core, and keys after the block are not multiplied."""


def choose_attention(model: Any, device: torch.device) -> None:
    """Let a model attend in blocks if it computes on a CPU by AMD. Models on other devices keep their attention."""
    if device.type == "cpu" and str(torch.cpu.get_capabilities().get("cpu_name", "")).startswith("AMD"):
        model.set_attn_implementation(CAUSAL_BLOCKS)


class _CausalBlocks(torch.autograd.Function):
    """Attention of scaled queries [B, H, S, D] to keys and values [B, K, S, D], all of one type.

    The backward pass computes the probabilities again. Keeping them would take a quarter of its time less, and
    B * H * S * S numbers a layer.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return softmax(query @ key.T) @ value [B, H, S, D], over the keys up to each query."""
        ctx.save_for_backward(query, key, value)
        q, k, v = _grouped(query, key, value)
        attended = torch.empty_like(q)
        for block, seen in _blocks(q.shape[2]):
            attended[:, :, block] = (_probabilities(q[:, :, block], k[:, seen]) @ v[:, seen]).view_as(q[:, :, block])
        return attended.view(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Return the gradients of query, key and value for that of the result, `gradient` [B, H, S, D].

        The formulas are those of FlashAttention (arXiv 2205.14135, appendix B.2). With the probabilities p and the
        gradient g, that of value is p.T @ g. That of the scores is s = p * (r - sum of p * r over keys), where r is
        g @ value.T. Those of query and key are s @ key and s.T @ query.
        """
        query, key, value = ctx.saved_tensors
        q, k, v = _grouped(query, key, value)
        given = gradient.reshape(q.shape)
        of_q = torch.empty_like(q)
        # fp32: a bf16 sum over blocks would drop small contributions
        of_k, of_v = (torch.zeros_like(each, dtype=torch.float32) for each in (k, v))
        for block, seen in _blocks(q.shape[2]):
            queries, given_rows = q[:, :, block].flatten(1, 2), given[:, :, block].flatten(1, 2)
            p = _probabilities(q[:, :, block], k[:, seen])
            of_v[:, seen] += p.transpose(1, 2) @ given_rows
            of_p = given_rows @ v[:, seen].transpose(1, 2)
            of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype)
            of_q[:, :, block] = (of_scores @ k[:, seen]).view_as(q[:, :, block])
            of_k[:, seen] += of_scores.transpose(1, 2) @ queries
        return of_q.view(query.shape), of_k.to(key.dtype).view(key.shape), of_v.to(value.dtype).view(value.shape)


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [B * K, G, S, D], keys and values [B * K, S, D]. All heads of a group share one product."""
    batch, heads, length, width = query.shape
    shared = batch * key.shape[1]
    groups = heads // key.shape[1]
    return (
        query.reshape(shared, groups, length, width),
        key.reshape(shared, length, width),
        value.reshape(shared, length, width),
    )


def _blocks(length: int) -> list[tuple[slice, slice]]:
    """Return (queries, the keys up to the last of them) of each block."""
    ends = [min(start + BLOCK, length) for start in range(0, length, BLOCK)]
    return [(slice(start, end), slice(0, end)) for start, end in zip(range(0, length, BLOCK), ends, strict=True)]


def _probabilities(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the probabilities [B * K, G * n, S] of n queries [B * K, G, n, D] over S keys, the last n their own."""
    _, _, count, _ = queries.shape
    scores = queries.flatten(1, 2) @ keys.transpose(1, 2)
    later = torch.full((count, count), -torch.inf, dtype=scores.dtype, device=scores.device).triu_(1)
    scores.unflatten(1, (-1, count))[..., -count:].add_(later)
    return torch.softmax(scores, -1)


def causal_blocks(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Return (attention [B, S, H, D], no weights), as transformers' functions do.

    Queries and keys are fp32 under autocast, after the rotary embedding, and are rounded to the type of the values.
    Masks, dropout and caches are left to torch's kernel.
    """
    length, scaling = query.shape[2], kwargs.get("scaling")
    if attention_mask is not None or kwargs.get("dropout") or length != key.shape[2] or length == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaled = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)).to(value.dtype)
    with torch.autocast(query.device.type, enabled=False):  # which would compute the softmax in fp32
        attended = _CausalBlocks.apply(scaled, key.to(value.dtype), value)
    return attended.transpose(1, 2).contiguous(), None  # type: ignore[union-attr]


ALL_ATTENTION_FUNCTIONS.register(CAUSAL_BLOCKS, causal_blocks)
ALL_MASK_ATTENTION_FUNCTIONS.register(CAUSAL_BLOCKS, sdpa_mask)
