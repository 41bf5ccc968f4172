"""Reusing what the KV cache already holds of a new prompt; the same rule for every engine."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.errors import ContextOverflowError


def reusable_prefix(cached: Sequence[int], tokens: Sequence[int], context_length: int) -> int:
    """How many of `tokens` are `cached` already, at most all but the last: its logits are asked for.

    Raises ContextOverflowError where the tokens do not fit the context window, ValueError where there are none.
    """
    if not tokens:
        raise ValueError("prefill needs at least one token")
    if len(tokens) > context_length:
        raise ContextOverflowError(
            f"the prompt has {len(tokens)} tokens, the context window {context_length}; "
            "shorten the prompt or load with a larger --context"
        )
    common, limit = 0, min(len(cached), len(tokens) - 1)
    while common < limit and cached[common] == tokens[common]:
        common += 1
    return common


def check_room(used: int, context_length: int) -> None:
    """ContextOverflowError where no further token fits."""
    if used >= context_length:
        raise ContextOverflowError(
            f"the context window of {context_length} tokens is full; load with a larger --context"
        )
