"""`--target executorch`: a .pte that ExecuTorch's own LLM runner takes, verified. Imports no torch until it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...runtime.base import flags
from ...runtime.base.extras import extra
from ...runtime.engines.executorch_loader import import_executorch, quiet_executorch
from ..checkpoint import Checkpoint
from ..request import ExportRequest, PaddingOptions
from ..targets import Exporter

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class ExecutorchOptions(PaddingOptions):
    """--target executorch"""

    quantize: str = ""
    """Weight type: f32, f16, 8da4w, int8; default: the recipe's, 8da4w for xnnpack and vulkan, f32 for the others."""
    output_type: str = ""
    """Type of the LM head where the default is not wanted: int8, int4."""
    embedding_type: str = ""
    """Type of the token embedding where the default is not wanted: int8, int4."""
    group_size: int = 32
    """Weights per scale of 8da4w: 32, 64 or 128."""
    recipe: str = "xnnpack"
    """Backend, one of xnnpack, portable, vulkan, coreml, openvino."""
    custom_ops: bool = True
    """Use ExecuTorch's LLM operators; off for a runtime without them (decoding is several times slower)."""
    max_context: int = flags.count(2048)
    """Slots of the key/value caches, at most the model's context."""
    allow_fp32: bool = False
    """Leave matrices in fp32 that 8da4w cannot hold."""

    def __post_init__(self) -> None:
        sizes = ", ".join(map(str, GROUP_SIZES))
        flags.require(self, "group_size", self.group_size in GROUP_SIZES, f"XNNPACK takes {sizes}")


def export_executorch(checkpoint: Checkpoint, request: ExportRequest[ExecutorchOptions], folder: Path) -> None:
    """Write the program, tokenizer files and manifest."""
    import_executorch()
    with quiet_executorch():
        with extra("executorch"):  # which brings optimum and torchao, too
            from .program import write_program
        write_program(checkpoint, request, folder)


EXPORTER = Exporter(ExecutorchOptions, export_executorch)
