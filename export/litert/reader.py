"""Read the matrices of a .tflite back, dequantised, with LiteRT's interpreter. Imports no torch.

A program has no names of ours. `read_weights` finds each matrix of the checkpoint by its contents: every weight of the
file must be the checkpoint's, rounded to the nearest code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.base.errors import ArtefactError
from ...train.model.tensors import EMBEDDING
from ..checkpoint import Checkpoint
from ..padding import padded_tensors
from ..verification import StoredWeights

NEAREST = 0.501
"""Largest distance of a weight from its code, in scales: a half, and the rounding of a division."""


def read_weights(path: Path, checkpoint: Checkpoint) -> StoredWeights:
    """Return the weights of the program at `path`. Raises ArtefactError for a matrix that it does not hold."""
    architecture = replace(checkpoint.architecture, tie_word_embeddings=False)
    stored = list(_matrices(path))
    tensors, roundings = {}, {}
    for name, array in padded_tensors(checkpoint, architecture):
        tensors[name] = array
        if array.ndim < 2:
            continue
        found = next((each for each in stored if _holds(*each, array)), None)
        if found is None:
            raise ArtefactError(
                f"litert: the program holds no matrix that is {name} rounded to its nearest codes; nothing was "
                "written. Please report this model; --no-verify exports it anyway"
            )
        codes, scales = found
        tensors[name] = codes.astype(np.float32) * scales
        if name != EMBEDDING:
            roundings[name] = "int8 per token"
    return StoredWeights(architecture, checkpoint.scales, tensors, roundings, "codes of the program, by LiteRT")


def _matrices(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (codes int8 [N, K], scales fp32 [N, 1]) of the program's matrices."""
    from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-not-found]

    interpreter: Any = Interpreter(str(path), num_threads=1)
    found = []
    for graph in range(interpreter.num_subgraphs()):  # decoding and prefills of each length, which need fewer matrices
        for entry in interpreter.get_tensor_details(graph):
            scales = entry["quantization_parameters"]["scales"]
            if len(entry["shape"]) == 2 and entry["dtype"] == np.int8 and len(scales) == entry["shape"][0]:
                found.append((interpreter.get_tensor(entry["index"], graph), scales[:, None]))
    return found


def _holds(codes: np.ndarray, scales: np.ndarray, array: np.ndarray) -> bool:
    """Tell whether codes are those of `array`."""
    return codes.shape == array.shape and bool((np.abs(codes * scales - array) <= NEAREST * scales).all())
