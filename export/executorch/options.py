"""Flags of `--target executorch`, without the torch code that writes the program."""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime.base import flags
from ..request import PaddingOptions

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class ExecutorchOptions(PaddingOptions):
    """--target executorch."""

    quantize: str = ""
    """Weight type: f32, f16, 8da4w, int8; default: the recipe's, 8da4w for xnnpack and vulkan, f32 for the others."""
    output_type: str = ""
    """Type of the LM head: int8, int4."""
    embedding_type: str = ""
    """Type of the token embedding: int8, int4."""
    group_size: int = 32
    """Weights per scale of 8da4w: 32, 64 or 128."""
    recipe: str = "xnnpack"
    """Backend, one of xnnpack, portable, vulkan, coreml, openvino."""
    custom_ops: bool = True
    """Use ExecuTorch's LLM operators; turn off for runtimes without them (decoding is several times slower)."""
    max_context: int = flags.count(2048, at_least=2)
    """Slots of the key/value caches, at most the model's context."""
    allow_fp32: bool = False
    """Keep matrices in fp32 that 8da4w cannot store."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        sizes = ", ".join(map(str, GROUP_SIZES))
        flags.require(self, "group_size", self.group_size in GROUP_SIZES, f"XNNPACK takes {sizes}")
