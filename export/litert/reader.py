"""Read the matrices of a .tflite back, dequantised, with LiteRT's interpreter. Imports no torch.

A program has no names of ours, so matrices are found by their contents. Every matrix of the file must be one of the
checkpoint's, rounded to the nearest codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.base.errors import ArtefactError
from ...train.model.tensors import EMBEDDING
from ..checkpoint import Checkpoint
from ..padding import padded_tensors
from ..verification import REPORT, StoredWeights

NEAREST = 0.501
"""Largest distance of a weight from its code, in scales: a half, and the rounding of a division."""


def read_weights(path: Path, checkpoint: Checkpoint) -> StoredWeights:
    """Return the weights of the program at `path`.

    Raises ArtefactError for a matrix that is none of the checkpoint's, and for one that the program does not hold.
    """
    architecture = replace(checkpoint.architecture, tie_word_embeddings=False)
    tensors = dict(padded_tensors(checkpoint, architecture))
    source = {name: array for name, array in tensors.items() if array.ndim > 1}
    for codes, scales in _matrices(path):
        names = [name for name, array in source.items() if _holds(codes, scales, array)]
        if not names:
            raise _error(f"a matrix of {len(codes)} rows is none of the checkpoint's, rounded to the nearest codes")
        tensors |= dict.fromkeys(names, codes.astype(np.float32) * scales)
    missing = next((name for name, array in source.items() if tensors[name] is array), None)
    if missing is not None:
        raise _error(f"{missing} is missing")
    roundings = dict.fromkeys(source.keys() - {EMBEDDING}, "int8 per token")
    return StoredWeights(architecture, checkpoint.scales, tensors, roundings, "codes of the program, by LiteRT")


def _error(fault: str) -> ArtefactError:
    return ArtefactError(f"litert: in the written program {fault}; {REPORT}")


def _matrices(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (codes int8 [N, K], scales fp32 [N, 1]) of the program's matrices."""
    from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-not-found]

    interpreter: Any = Interpreter(str(path), num_threads=1)
    for graph in range(interpreter.num_subgraphs()):  # decoding and prefills of each length, which need fewer matrices
        for entry in interpreter.get_tensor_details(graph):
            scales = entry["quantization_parameters"]["scales"]
            if len(entry["shape"]) == 2 and entry["dtype"] == np.int8 and len(scales) == entry["shape"][0]:
                yield interpreter.get_tensor(entry["index"], graph), scales[:, None]


def _holds(codes: np.ndarray, scales: np.ndarray, array: np.ndarray) -> bool:
    """Tell whether codes are those of `array`. The first row rules most others out."""
    parts = (slice(1), slice(None))
    return codes.shape == array.shape and all(
        bool((np.abs(codes[part] * scales[part] - array[part]) <= NEAREST * scales[part]).all()) for part in parts
    )
