"""ExecuTorch backends by the name of `--recipe`. A package of a backend is imported only when a program is lowered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...runtime.base.quantities import unknown_name


@dataclass(frozen=True)
class Recipe:
    """Lowering of a program to one backend."""

    name: str
    partitioners: Callable[[], list[Any]]
    """Return ExecuTorch partitioners."""
    formats: tuple[str, ...]
    """Supported `--quantize` values; the first is the default."""


def _xnnpack() -> list[Any]:
    """Return one greedy partitioner, which makes 123 delegates of 30 layers instead of 304."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner()]


RECIPES = {
    # ARM and x86 CPUs: the backend of ExecuTorch's phone apps
    "xnnpack": Recipe("xnnpack", _xnnpack, formats=("8da4w", "int8", "f32", "f16")),
    # ExecuTorch's own kernels without a backend, for any processor and for checking the others
    "portable": Recipe("portable", list, formats=("f32",)),
}


def find_recipe(name: str) -> Recipe:
    """Return the recipe of `--recipe name`. Raises UsageError with the known names."""
    if name not in RECIPES:
        raise unknown_name("--recipe", name, RECIPES)
    return RECIPES[name]
