"""GPUs of Android phones."""

from __future__ import annotations

from typing import Any

from . import Recipe


def partitioners() -> list[Any]:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return [VulkanPartitioner({"require_dynamic_shapes": True})]


RECIPE = Recipe("vulkan", partitioners, formats=("8da4w", "f32"), runs_here=False)
