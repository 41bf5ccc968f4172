"""The user's request to an exporter, the channel for notes, and the clock of its stages."""

from __future__ import annotations

import logging
import time
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


class Clock:
    """Times of the stages of an export, which follow each other."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._stage = ""
        self.seconds: dict[str, float] = {}
        """{stage: seconds} of the stages that ended."""

    def begin(self, stage: str) -> None:
        """End the present stage, and report the next one with the seconds since the first."""
        self.end()
        self._stage = stage.partition(" ")[0]
        log.info("%.1f s: %s", self._last - self._began, stage)

    def end(self) -> None:
        """Add the time of the present stage to `seconds`."""
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] = round(self.seconds.get(self._stage, 0.0) + now - self._last, 3)
        self._stage, self._last = "", now

    def __str__(self) -> str:
        """Return the seconds of all stages in words."""
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s ({stages})"


@dataclass(frozen=True)
class ExportRequest(Generic[OptionsT_co]):
    """The target's options and a channel for notes to the user."""

    options: OptionsT_co
    output: Path
    """Final folder of the artefact."""
    notes: list[str] = field(default_factory=list)
    """Reported notes, for the manifest."""
    limits: list[str] = field(default_factory=list)
    """Statements of what differs from the checkpoint or was not verified, for manifest, model card and last line."""
    clock: Clock = field(default_factory=Clock)

    def say(self, text: str) -> None:
        """Report a line and keep it for the manifest."""
        self.notes.append(text)
        log.info(text)
