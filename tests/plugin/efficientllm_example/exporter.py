"""`--target bigram`: what is left of a model without its layers, a table of which token follows which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from efficientllm.export.checkpoint import Checkpoint
from efficientllm.export.manifest import Contents, copy_tokenizer, write_manifest
from efficientllm.export.request import ExportRequest
from efficientllm.export.targets import Exporter

FILE = "bigram.npy"


@dataclass(frozen=True)
class BigramOptions:
    """bigram"""

    half: bool = False
    """Store fp16 instead of fp32."""


def export_bigram(checkpoint: Checkpoint, request: ExportRequest[BigramOptions], folder: Path) -> None:
    """Write logits [V, V] of the next token after each token: embedding, final norm and head."""
    embedding = checkpoint.tensor("model.embed_tokens.weight")
    head = checkpoint.tensor("lm_head.weight") if checkpoint.has_tensor("lm_head.weight") else embedding
    scale = np.sqrt(np.square(embedding).mean(-1, keepdims=True) + checkpoint.scales.stem_eps)
    table = (embedding / scale * checkpoint.tensor("model.norm.weight")) @ head.T
    table = table.astype(np.float16 if request.options.half else np.float32)
    np.save(folder / FILE, table)
    contents = Contents(
        engine="bigram",
        files=[FILE, *copy_tokenizer(checkpoint, folder)],
        quantization="f16" if request.options.half else "f32",
        weight_bytes=table.nbytes,
        layout="bigram table",
        verification={},
    )
    write_manifest(checkpoint, request, folder, contents)


EXPORTER = Exporter(BigramOptions, export_bigram)
