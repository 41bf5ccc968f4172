"""What the user asked an exporter for, and how it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ExportOptions:
    """export"""

    quantize: str = ""
    """Weight type. gguf: f32, f16 (default), bf16, q8_0, q4_k_m, q4_0, ...; onnx: f32, int8 (default), mixed, int4."""
    output_type: str = ""
    """gguf: type of the LM head, where llama.cpp's own choice is not wanted."""
    embedding_type: str = ""
    """gguf: type of the token embedding, where llama.cpp's own choice is not wanted."""
    pad: Literal["auto", "none"] = "auto"
    """auto: zero-pad widths (exactly) where the quantised format would otherwise fall back to a larger type."""
    calibrate: str = ""
    """gguf: text (as efficientllm-train's --data) whose activations weigh the columns that are quantised."""
    max_kl: float | None = None
    """Largest mean KL divergence (nats per token) of the quantised file from the exact one; default by bits."""
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
