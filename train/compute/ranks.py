"""Averages over the ranks of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

MeanOverRanks = Callable[[Iterable[Tensor]], None]
"""Average tensors over ranks, in place."""


def alone(tensors: Iterable[Tensor]) -> None:
    """Do nothing: the mean over a single rank."""
