"""Points of the study of files: a type, a size and a training. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from efficientllm.runtime.base.quantities import parse_bytes
from efficientllm.train.config.pruning import PruneConfig
from efficientllm.train.config.sections import (
    GGUF_TYPES,
    OptimizerConfig,
    QuantisationConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from efficientllm.train.model.file_types import BODY, SIZED

TRAININGS = ("train", "qat")
"""Training on the weights as they are, or on the grid of the file."""


@dataclass(frozen=True)
class Point:
    """One file, written TYPE[/HEAD][@BYTES][+train | +qat][+imatrix]."""

    kind: str
    """Type of --quantize."""
    head: str = ""
    """Type of LM head and embedding; empty for llama.cpp's default."""
    target_bytes: int | None = None
    """Target of pruning in bytes; None for the whole model."""
    training: str = ""
    """One of TRAININGS; empty for the untrained source."""
    importance: bool = False
    """Whether an importance matrix guides the rounding."""

    @classmethod
    def parse(cls, text: str) -> Point:
        """Parse the text form. Raises ValueError with the reason."""
        rest, *marks = text.split("+")
        rest, _, size = rest.partition("@")
        kind, _, head = rest.partition("/")
        unknown = [mark for mark in marks if mark not in (*TRAININGS, "imatrix")]
        if unknown:
            raise ValueError(f"+{unknown[0]} is not one of +train, +qat, +imatrix")
        if kind not in BODY:
            raise ValueError(f"{kind} is not one of {', '.join(BODY)}")
        if head and head not in SIZED:
            raise ValueError(f"{head} is not one of {', '.join(SIZED)}")
        training = next((mark for mark in marks if mark in TRAININGS), "train" if size else "")
        if training == "qat" and (kind not in GGUF_TYPES or head not in ("", kind, "q8_0", "q4_0")):
            raise ValueError(f"+qat trains for {', '.join(GGUF_TYPES)} with a head of the same type, q8_0 or q4_0")
        return cls(kind, head, parse_bytes(size) if size else None, training, "imatrix" in marks)

    def __str__(self) -> str:
        size = f"@{self.target_bytes / 1e6:g}MB" if self.target_bytes else ""
        training = f"+{self.training}" if self.training and (self.training == "qat" or not size) else ""
        head = f"/{self.head}" if self.head else ""
        return f"{self.kind}{head}{size}{training}{'+imatrix' if self.importance else ''}"

    @property
    def folder(self) -> str:
        """Return its folder name."""
        return str(self).replace("/", "-")

    @property
    def quantisation(self) -> QuantisationConfig:
        if self.training != "qat":
            return QuantisationConfig()
        head = "same" if self.head in ("", self.kind) else self.head
        return QuantisationConfig(qat=self.kind, qat_head=head)  # type: ignore[arg-type]

    @property
    def pruning(self) -> PruneConfig:
        """Return the pruning settings: one removal after a tenth of the tokens, with a fit.

        This is best for few tokens (research/log).
        """
        if self.target_bytes is None:
            return PruneConfig(prune=("none",))
        is_qat = self.training == "qat"
        return PruneConfig(
            target_bytes=self.target_bytes,
            quantize="" if is_qat else self.kind,
            output_type="" if is_qat else self.head,
            saliency="token-fisher",
            prune_start=0.1,
            prune_end=0.1,
            recover="least-squares",
        )

    @property
    def export_flags(self) -> list[str]:
        """Return the flags of `efficientllm-export RUN --target gguf`. A trained type is the default there."""
        if self.training == "qat":
            return []
        flags = ["--quantize", self.kind]
        flags += ["--output-type", self.head, "--embedding-type", self.head] if self.head else []
        return flags + (["--calibrate", "demo"] if self.importance else [])


@dataclass(frozen=True)
class Recipe:
    """Settings that all trained points share."""

    source: str = "demo"
    data: tuple[str, ...] = ("demo:0.7", "self-chat:0.3")
    tokens: int = 30_720
    batch_size: int = 2
    sequence_length: int = 256
    learning_rate: float = 1e-4

    def train_config(self, point: Point, output: str, seed: int = 0) -> TrainConfig:
        """Return the training settings of a point: distillation from the unquantised source."""
        return TrainConfig(
            source=SourceConfig(
                source=self.source, data=self.data, sequence_length=self.sequence_length, eval_tokens=8192
            ),
            pruning=point.pruning,
            quantisation=point.quantisation,
            optimizer=OptimizerConfig(
                tokens=self.tokens,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                distill=1.0,
                cross_entropy=0.1 if point.target_bytes else 0.0,  # saliency needs its gradient
            ),
            run=RunConfig(output=output, quality=False, checkpoint_every=0, seed=seed),
        )
