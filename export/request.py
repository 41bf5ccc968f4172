"""The user's request to an exporter, and the channel for notes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

from ..runtime.base import flags

log = logging.getLogger("efficientllm.export")
"""Logger of the command's output: see runtime/base/command.py."""

OptionsT_co = TypeVar("OptionsT_co", covariant=True)


@dataclass(frozen=True)
class VerifyOptions:
    """Every target."""

    verify: bool = True
    """Compare the file with torch and refuse it beyond the limits."""


@dataclass(frozen=True)
class RoundingOptions(VerifyOptions):
    """Targets that round weights to few bits."""

    calibrate: str = ""
    """Text (as efficientllm-train's --data) that guides the rounding by its activations: llama.cpp's importance matrix
    for gguf, error-compensated rounding (GPTQ) of int4 matrices elsewhere."""
    max_kl: float | None = flags.number(None, at_least=0)
    """Largest mean KL divergence (nats per token) of the quantised file from the exact one; default: reported only.
    The perplexity of the sample may grow by a factor of its exponential."""


@dataclass(frozen=True)
class PaddingOptions(RoundingOptions):
    """Targets whose formats want widths in multiples."""

    pad: Literal["auto", "none"] = "auto"
    """auto: zero-pad widths (exactly) if the quantised format would otherwise fall back to a larger type."""


@dataclass(frozen=True)
class ExportRequest(Generic[OptionsT_co]):
    """The target's options and a channel for notes to the user."""

    options: OptionsT_co
    output: Path
    """Final folder of the artefact."""
    notes: list[str] = field(default_factory=list)
    """Reported notes, for the manifest."""

    def say(self, text: str) -> None:
        """Report a line and keep it for the manifest."""
        self.notes.append(text)
        log.info(text)
