"""CPUs, ARM and x86: the backend of ExecuTorch's phone apps."""

from __future__ import annotations

from typing import Any

from . import Recipe


def partitioners() -> list[Any]:
    """One greedy partitioner: 123 delegates for 30 layers where the dynamic-quantisation one first gives 304."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner()]


RECIPE = Recipe("xnnpack", partitioners, formats=("8da4w", "int8", "f32", "f16"))
