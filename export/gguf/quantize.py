"""Quantise a GGUF with llama.cpp's own quantiser, and report the type of each tensor."""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.base.child import run_python
from ...runtime.base.errors import ArtefactError
from ...runtime.base.ggml_types import WRITTEN_TYPES

if TYPE_CHECKING:
    from .type_choice import FileTypes


def quantize_gguf(source: Path, target: Path, types: FileTypes, importance: Path | None = None) -> list[Fallback]:
    """Quantise in a child process and return the tensors with a fallback type.

    `importance` is an .npz of fp32 column weights by tensor name (llama.cpp's importance matrix). Raises ArtefactError
    if llama.cpp refuses.
    """
    request = {
        "importance": str(importance) if importance else None,
        "source": str(source),
        "target": str(target),
        "ftype": WRITTEN_TYPES[types.name],
        "output_tensor_type": types.output,
        "token_embedding_type": types.embedding,
    }
    # ggml aborts on some errors, which would end this process
    done = run_python("-m", __spec__.name, json.dumps(request))
    if done.code:
        raise ArtefactError(f"llama.cpp cannot quantise to {types.name}: {done.last_error}")
    return parse_fallbacks(done.errors)


@dataclass(frozen=True)
class Fallback:
    """A tensor with another type than requested."""

    tensor: str
    wanted: str
    multiple: int
    """Multiple that rows of the requested type need."""
    got: str


_FALLBACK = re.compile(
    r"(?P<tensor>[\w.]+)\s+- ncols\s+\d+ not divisible by\s+(?P<multiple>\d+) "
    r"\(required for type\s+(?P<wanted>\w+)\).*falling back to\s+(?P<got>\w+)"
)
"""A line of llama.cpp's quantiser in llama-cpp-python 0.3.36."""


def parse_fallbacks(log: str) -> list[Fallback]:
    """Return the fallbacks in the quantiser's log. llama.cpp reports a second step (to F16) as one line."""
    return [
        Fallback(match["tensor"], match["wanted"].lower(), int(match["multiple"]), match["got"].lower())
        for match in _FALLBACK.finditer(log)
    ]


def describe_fallbacks(fallbacks: list[Fallback], is_padded: bool) -> list[str]:
    """Return one sentence per (requested, actual) pair, with the tensors by kind.

    `is_padded` tells whether widths were padded to whole blocks.
    """
    groups: dict[tuple[str, str, int], list[str]] = {}
    for each in fallbacks:
        groups.setdefault((each.wanted, each.got, each.multiple), []).append(each.tensor)
    sentences = []
    for (wanted, got, multiple), tensors in groups.items():
        kinds = Counter(tensor.split(".")[-2] for tensor in tensors)
        names = ", ".join(f"{kind} x{count}" if count > 1 else kind for kind, count in kinds.items())
        hint = " (--pad auto avoids that)" if multiple == 32 and not is_padded else ""
        tensor, its = ("1 tensor", "its") if len(tensors) == 1 else (f"{len(tensors)} tensors", "their")
        reason = f"{its} rows are not multiples of {multiple}{hint}"
        sentences.append(f"{tensor} became {got}, not {wanted}: {reason}: {names}")
    return sentences


def _main(argument: str) -> None:
    import llama_cpp

    request: dict[str, Any] = json.loads(argument)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = request["ftype"]
    for name in ("output_tensor_type", "token_embedding_type"):
        if request[name] is not None:
            setattr(parameters, name, request[name])
    if request["importance"]:
        matrix, _keep_alive = _importance_matrix(Path(request["importance"]))
        parameters.imatrix = matrix
    status = llama_cpp.llama_model_quantize(
        request["source"].encode(), request["target"].encode(), ctypes.pointer(parameters)
    )
    sys.exit(1 if status else 0)


def _importance_matrix(path: Path) -> tuple[Any, list[Any]]:
    """Return (null-terminated llama_model_imatrix_data array, objects that must stay alive)."""
    import llama_cpp
    import numpy as np

    entries, arrays = [], []
    with np.load(path) as archive:
        for name in archive.files:
            array = np.ascontiguousarray(archive[name], dtype=np.float32)
            pointer = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entries.append(llama_cpp.llama_cpp.llama_model_imatrix_data(name.encode(), pointer, array.size))
            arrays.append(array)
    entry_type = llama_cpp.llama_cpp.llama_model_imatrix_data
    matrix = (entry_type * (len(entries) + 1))(*entries)  # the last entry stays zero: the end
    # llama.cpp gets addresses only, so Python must not free the arrays before the quantiser has run
    return ctypes.cast(matrix, ctypes.POINTER(entry_type)), [matrix, arrays]


if __name__ == "__main__":
    _main(sys.argv[1])
