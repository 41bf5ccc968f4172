"""ExecuTorch backends by the name of `--recipe`. A package of a backend is imported only when a program is lowered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...runtime.base.errors import UsageError
from ...runtime.base.quantities import unknown_name


@dataclass(frozen=True)
class Recipe:
    """Lowering of a program to one backend."""

    name: str
    partitioners: Callable[[], list[Any]]
    """Return ExecuTorch partitioners. Raises UsageError with the missing package."""
    formats: tuple[str, ...]
    """Supported `--quantize` values; the first is the default."""
    custom_ops: bool = True
    """True if the program may have ExecuTorch's own LLM operators."""
    static_length: bool = False
    """True if the backend needs fixed shapes: one token per call, also for the prompt."""
    runs_here: bool = True
    """True if the Python runtime can execute the program, so that it can be verified."""


def _xnnpack() -> list[Any]:
    """Return one greedy partitioner, which makes 123 delegates of 30 layers instead of 304."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner()]


def _vulkan() -> list[Any]:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return [VulkanPartitioner({"require_dynamic_shapes": True})]


def _coreml() -> list[Any]:
    """Return a partitioner that takes the program in fp32 and computes in fp16, CoreML's default.

    With an fp16 program, coremltools 9 refuses the update of the caches.
    """
    try:
        import coremltools
        from executorch.backends.apple.coreml.compiler import CoreMLBackend
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    except ModuleNotFoundError as error:
        raise UsageError("--recipe coreml needs coremltools; run: pip install coremltools") from error
    specs = CoreMLBackend.generate_compile_specs(minimum_deployment_target=coremltools.target.iOS18)
    return [CoreMLPartitioner(compile_specs=specs, take_over_mutable_buffer=True)]


def _openvino() -> list[Any]:
    try:
        from executorch.backends.openvino.partitioner import OpenvinoPartitioner
        from executorch.exir.backend.backend_details import CompileSpec
    except ModuleNotFoundError as error:
        raise UsageError("--recipe openvino needs openvino and nncf; run: pip install openvino nncf") from error
    return [OpenvinoPartitioner([CompileSpec("device", b"CPU")])]


RECIPES = {
    # ARM and x86 CPUs: the backend of ExecuTorch's phone apps
    "xnnpack": Recipe("xnnpack", _xnnpack, formats=("8da4w", "int8", "f32", "f16")),
    # ExecuTorch's own kernels without a backend, for any processor and for checking the others
    "portable": Recipe("portable", list, formats=("f32",)),
    # GPUs of Android phones
    "vulkan": Recipe("vulkan", _vulkan, formats=("8da4w", "f32"), runs_here=False),
    # Apple's neural engine and GPU
    "coreml": Recipe("coreml", _coreml, ("f32",), custom_ops=False, static_length=True, runs_here=False),
    # Intel CPUs, GPUs and NPUs
    "openvino": Recipe("openvino", _openvino, ("f32",), custom_ops=False, static_length=True, runs_here=False),
}


def find_recipe(name: str) -> Recipe:
    """Return the recipe of `--recipe name`. Raises UsageError with the known names."""
    if name not in RECIPES:
        raise unknown_name("--recipe", name, RECIPES)
    return RECIPES[name]
