"""What the user asked an exporter for, and how it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..runtime.base import flags


@dataclass(frozen=True)
class ExportOptions:
    """export"""

    quantize: str = ""
    """Weight type. gguf: f32, f16 (default), bf16, q8_0, q4_k_m, q4_0, ...; onnx: f32, f16, int8 (default), mixed,
    int4, web; executorch: f32, f16, 8da4w (default), int8."""
    output_type: str = ""
    """Type of the LM head where the default is not wanted. gguf: as --quantize; executorch: int8, int4."""
    embedding_type: str = ""
    """Type of the token embedding where the default is not wanted. gguf: as --quantize; executorch: int8, int4."""
    group_size: int = 32
    """executorch: weights per scale of 8da4w: 32, 64 or 128."""
    portable: bool = False
    """onnx: standard operators (opset 23) instead of onnxruntime's fused ones; f32, slower in onnxruntime."""
    recipe: str = "xnnpack"
    """executorch: backend, one of xnnpack, portable, vulkan, coreml, openvino, qnn."""
    custom_ops: bool = True
    """executorch: use its LLM operators; off for a runtime without them (decoding is several times slower)."""
    max_context: int = flags.count(2048)
    """executorch: slots of the key/value caches, at most the model's context."""
    allow_fp32: bool = False
    """executorch: leave matrices in fp32 that 8da4w cannot hold."""
    pad: Literal["auto", "none"] = "auto"
    """auto: zero-pad widths (exactly) where the quantised format would otherwise fall back to a larger type."""
    calibrate: str = ""
    """Text (as efficientllm-train's --data) whose activations guide the rounding to few bits. gguf: as llama.cpp's
    importance matrix; onnx and executorch: error-compensated rounding (GPTQ) of int4 matrices."""
    max_kl: float | None = None
    """Largest mean KL divergence (nats per token) of the quantised file from the exact one; default by bits. The
    perplexity of the sample may grow by a factor of its exponential."""
    verify: bool = True
    """Compare the file with torch and refuse it past the limits."""


@dataclass
class ExportRequest:
    """Options plus a channel for what the user should know."""

    options: ExportOptions
    output: Path
    """Where the artefact will be once it is whole."""
    print_line: Callable[[str], None] = print
    notes: list[str] = field(default_factory=list)

    @property
    def verify(self) -> bool:
        return self.options.verify

    def say(self, text: str) -> None:
        """Print a line and keep it for the manifest."""
        self.notes.append(text)
        self.print_line(text)
