"""What averages over the ranks of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

MeanOverRanks = Callable[[Iterable[Tensor]], None]
"""Averages tensors over ranks, in place."""


def alone(tensors: Iterable[Tensor]) -> None:
    """The mean over ranks of a run that has one."""
