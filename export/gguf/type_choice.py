"""Choose the types of the tensors in a GGUF: the flags, the trained type, that of --target-bytes, or the default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...runtime.base.quantities import unknown_name
from ..checkpoint import Checkpoint, TrainedType, choose_type
from ..request import ExportRequest

DEFAULT = "q8_0"


def tensor_type(flag: str, name: str) -> int | None:
    """Return the ggml type of an `--output-type` or `--embedding-type` value; None if unset."""
    import gguf

    if not name:
        return None
    try:
        return int(gguf.GGMLQuantizationType[name.upper()])
    except KeyError as error:
        known = [item.name.lower() for item in gguf.GGMLQuantizationType]
        raise unknown_name(flag, name, known, of=" tensor type") from error


@dataclass(frozen=True)
class FileTypes:
    """Types of a file's tensors."""

    name: str
    """A key of WRITTEN_TYPES."""
    output: int | None
    """ggml type of the LM head; None for llama.cpp's default."""
    embedding: int | None
    are_trained: bool
    """Whether the checkpoint was trained for exactly these types, so that its weights are kept to the bit."""

    @classmethod
    def resolve(cls, checkpoint: Checkpoint, request: ExportRequest[Any]) -> FileTypes:
        """Return the requested types, or the trained ones, or those that --target-bytes counted, or the defaults."""
        options, trained = request.options, TrainedType.of(checkpoint)
        counted = {} if options.quantize else checkpoint.json_file("training.json").get("counted_in", {})
        name = choose_type(checkpoint, request, "gguf", options.quantize, counted.get("quantize", DEFAULT))
        is_trained = trained is not None and (trained.target, trained.kind) == ("gguf", name)
        head = trained.head if trained is not None and is_trained else ""
        output = options.output_type or head or counted.get("output_type", "")
        embedding = options.embedding_type or head
        return cls(
            name,
            tensor_type("--output-type", output),
            tensor_type("--embedding-type", embedding),
            is_trained and output == embedding == head,
        )
