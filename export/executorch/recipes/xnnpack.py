"""ARM and x86 CPUs: the backend of ExecuTorch's phone apps."""

from __future__ import annotations

from typing import Any

from . import Recipe


def partitioners() -> list[Any]:
    """Return one greedy partitioner, which makes 123 delegates of 30 layers instead of 304."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner()]


RECIPE = Recipe("xnnpack", partitioners, formats=("8da4w", "int8", "f32", "f16"))
