"""Floating-point operations of a run, from what it logged."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture


def matmul_parameters(architecture: Architecture, num_parameters: int) -> int:
    """Parameters that multiply activations: all but the embedding table, which counts once where the head shares it."""
    table = 0 if architecture.tie_word_embeddings else architecture.vocab_size * architecture.hidden_size
    return num_parameters - table


def training_flops(
    records: list[dict[str, Any]], initial_parameters: int, source: Architecture, with_teacher: bool
) -> float:
    """FLOPs of the steps in a run's metrics, which began with a model of `initial_parameters`.

    6 N per token for forward and backward (Kaplan et al., 2020), 2 N more for a teacher; attention scores are left
    out, which at 256 tokens are less than 3 % of a 135M model's."""
    total, before, parameters = 0.0, 0, initial_parameters
    teacher = 2 * matmul_parameters(source, source.num_parameters) if with_teacher else 0
    for record in records:
        if "loss" in record:
            tokens, before = record["tokens"] - before, record["tokens"]
            total += tokens * (6 * matmul_parameters(source, parameters) + teacher)
            parameters = record["parameters"]  # after the step's removal
    return total
