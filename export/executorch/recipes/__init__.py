"""ExecuTorch backends, one module each with its RECIPE."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ....runtime.base.quantities import unknown_name

NAMES = ("xnnpack", "portable", "vulkan", "coreml", "openvino")


@dataclass(frozen=True)
class Recipe:
    """Lowering of a program to one backend."""

    name: str
    partitioners: Callable[[], list[Any]]
    """Return ExecuTorch partitioners. Raises UsageError with the missing package."""
    formats: tuple[str, ...]
    """Supported `--quantize` values; the first is the default."""
    custom_ops: bool = True
    """Whether the program may have ExecuTorch's own LLM operators."""
    static_length: bool = False
    """Whether the backend needs fixed shapes: one token per call, also for the prompt."""
    runs_here: bool = True
    """Whether the Python runtime can execute the program, so that it can be verified."""


def load_recipe(name: str) -> Recipe:
    if name not in NAMES:
        raise unknown_name("--recipe", name, NAMES)
    recipe: Recipe = importlib.import_module(f"{__name__}.{name}").RECIPE
    return recipe
