"""The type that a checkpoint was trained for (`--qat`): its weights are on that type's grid. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .checkpoint import Checkpoint
from .request import ExportRequest

NAMES = {"int4-block32": "int4"}
"""--qat -> what the target's --quantize calls it, where that is another name."""


@dataclass(frozen=True)
class TrainedType:
    """What training.json says."""

    kind: str
    """As the target's --quantize."""
    head: str
    """Of embedding and LM head in a GGUF."""
    target: str
    """The export target whose files have this type."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> TrainedType | None:
        """None for a checkpoint of another training, and of none."""
        values = checkpoint.json_file("training.json").get("quantisation")
        if not isinstance(values, dict):
            return None
        kind, head, target = (str(values.get(name, "")) for name in ("type", "head", "target"))
        return cls(NAMES.get(kind, kind), head, target)


def choose_type(checkpoint: Checkpoint, request: ExportRequest[Any], target: str, asked: str, default: str) -> str:
    """What to export in: as asked, else the type that the checkpoint was trained for. Says where they differ."""
    trained = TrainedType.of(checkpoint)
    if trained is None:
        return asked or default
    own = trained.kind if trained.target == target else ""
    chosen = asked or own or default
    if chosen not in (own, "f32"):
        remedy = f"--quantize {own}" if own else f"--target {trained.target} --quantize {trained.kind}"
        request.say(
            f"the checkpoint was trained for {trained.kind}, {chosen} is another grid: {remedy} keeps it exactly"
        )
    return chosen
