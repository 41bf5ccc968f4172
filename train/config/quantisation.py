"""`[quantisation]` section of a training run. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...runtime.base import flags

GGUF_TYPES = ("q8_0", "q4_0", "q2_0")
"""Types of llama.cpp's files."""

TARGETS = dict.fromkeys(GGUF_TYPES, "gguf") | {"int4-block32": "onnx", "8da4w": "executorch"}
"""Type -> export target of its files."""


@dataclass(frozen=True)
class QuantisationConfig:
    """Quantisation-aware training."""

    qat: Literal["none", "q8_0", "q4_0", "q2_0", "int4-block32", "8da4w"] = "none"
    """Train on the grid of a file type: q8_0, q4_0, q2_0 of GGUF, int4-block32 of ONNX (--quantize int4), 8da4w of
    ExecuTorch. Forward and backward use the rounded weights, the unrounded ones are updated, and the final model has
    the grid's values, which the export keeps to the bit."""
    qat_start: float = flags.number(0.0, at_least=0, below=1)
    """Share of the tokens before quantisation-aware training starts."""
    qat_head: Literal["same", "q8_0", "q4_0"] = "same"
    """Type of token embedding and LM head in a GGUF: same as --qat, or more bits (llama.cpp keeps them at q8_0)."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        flags.require(self, "qat_start", not self.qat_start or self.is_on, "needs --qat; give a type")
        is_known = self.qat_head == "same" or self.qat in GGUF_TYPES
        flags.require(self, "qat_head", is_known, f"needs --qat {', '.join(GGUF_TYPES)}")

    @property
    def is_on(self) -> bool:
        return self.qat != "none"

    @property
    def head_type(self) -> str:
        """Return the type of embedding and head in a GGUF."""
        return self.qat if self.qat_head == "same" else self.qat_head

    @property
    def export_format(self) -> tuple[str, str]:
        """Return (engine of such a file, the engine's name of the type)."""
        engine = {"gguf": "llama.cpp", "onnx": "onnxruntime", "executorch": "executorch"}[TARGETS[self.qat]]
        return engine, self.qat.removesuffix("-block32")

    def to_dict(self) -> dict[str, str]:
        """Return the fields of training.json for the exporters; export/checkpoint.py reads them."""
        return {"type": self.qat, "head": self.head_type, "target": TARGETS[self.qat]}
