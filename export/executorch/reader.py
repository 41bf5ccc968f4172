"""Read the matrices of a written .pte back, dequantised, with ExecuTorch's Python package.

XNNPACK's matrices are constants of the delegates, described by a flatbuffer for each delegate. Embeddings are constants
of the program. A program has no names for them: `read_weights` finds each matrix by its contents, so a code that
differs from the one given to the backend leaves a matrix unfound.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
from executorch.exir import schema
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.scalar_type import ScalarType
from torch import Tensor

from ...runtime.base.errors import ArtefactError
from ..verification import REPORT, StoredWeights
from .quantize import dequantized_table

DTYPES = {
    **{ScalarType.BYTE: torch.uint8, ScalarType.CHAR: torch.int8},
    **{ScalarType.HALF: torch.float16, ScalarType.FLOAT: torch.float32},
}
"""Element types of a program's constants."""


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A matrix of the program."""

    shape: tuple[int, int]
    values: Callable[[], Tensor]
    """Function that returns it, dequantised, fp32."""

    def cropped(self, array: np.ndarray) -> np.ndarray:
        """Return the values without the zeros behind the inputs of `array`."""
        return self.values()[:, : array.shape[1]].numpy()

    def holds(self, array: np.ndarray) -> bool:
        rows, columns = self.shape
        return rows == len(array) and columns >= array.shape[1] and np.array_equal(self.cropped(array), array)


def read_weights(path: Path, given: StoredWeights) -> StoredWeights:
    """Return the weights with every matrix as it is in the program at `path`.

    Raises ArtefactError for a matrix of `given` that the program does not hold to the bit.
    """
    program = deserialize_pte_binary(path.read_bytes())
    matrices = [*_embeddings(program.program), *_delegated(program)]
    tensors = dict(given.tensors)
    for name, array in given.tensors.items():
        if array.ndim < 2:
            continue
        found = next((each for each in matrices if each.holds(array)), None)
        if found is None:
            raise ArtefactError(
                f"executorch: the program holds no matrix with the codes that were given for {name}; {REPORT}"
            )
        tensors[name] = found.cropped(array)
        matrices.remove(found)  # a tied head has the codes of the embedding, and each is stored
    return replace(given, tensors=tensors, origin="codes of the program, by ExecuTorch's package")


def _delegated(file: Any) -> Iterator[_Matrix]:
    """Yield the matrices of XNNPACK's products."""
    program, named = file.program, file.named_data
    blobs = {} if named is None else {key: named.buffers[at.buffer_index] for key, at in named.pte_data.items()}
    for delegate in program.execution_plan[0].delegates:
        if delegate.id != "XnnpackBackend":
            continue
        data = program.backend_delegate_data[delegate.processed.index].data
        graph = _xnnpack_graph(data)
        values = {_base(value)["id_out"]: value for value in graph["xvalues"]}
        keys = [entry["named_key"] for entry in graph["constant_data"]]
        for node in graph["xnodes"]:
            if node["xnode_union_type"] == "XNNFullyConnected":
                weight = values[node["xnode_union"]["filter_id"]]
                # `keys` is bound now: the matrix is read later, when the loop is at another delegate
                yield _product(weight, lambda index, keys=keys: blobs[keys[index]])


def _xnnpack_graph(data: bytes) -> dict[str, Any]:
    """Return a delegate's flatbuffer as JSON."""
    header = XNNHeader.from_bytes(data[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "schema.fbs").write_bytes(_get_schema_bytes())
        (folder / "graph.bin").write_bytes(data[header.flatbuffer_offset :][: header.flatbuffer_size])
        _flatc_decompile(name, str(folder / "schema.fbs"), str(folder / "graph.bin"), ["--raw-binary"])
        return json.loads((folder / "graph.json").read_text(encoding="utf-8"))


def _base(value: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that values with and without scales share."""
    return value["xvalue_union"].get("tensor_value", value["xvalue_union"])


def _product(value: dict[str, Any], constant: Callable[[int], bytes]) -> _Matrix:
    """Return the matrix of a fully connected node. `constant` returns a constant by its index."""
    base = _base(value)
    kind, shape = base["datatype"].rpartition("_")[2], tuple(base["dims"])

    def values() -> Tensor:
        data = constant(base["constant_buffer_idx"])
        if kind in ("fp32", "fp16"):
            dtype = torch.float16 if kind == "fp16" else torch.float32
            return _tensor(data, dtype).reshape(shape).float()
        scales = constant(value["xvalue_union"]["quant_params"]["scale_buffer_idx"])
        if kind == "qcint8":
            codes = _tensor(data, torch.int8).reshape(shape)
            return codes * _tensor(scales, torch.float32)[:, None]
        # int4: the even column in the lower half, codes shifted by 8
        packed = _tensor(data, torch.uint8)
        halves = torch.stack([packed & 15, packed >> 4], -1)
        codes = halves.reshape(shape).float() - 8
        groups = _tensor(scales, torch.bfloat16).float().reshape(shape[0], -1, 1)
        return (codes.unflatten(1, (groups.shape[1], -1)) * groups).flatten(1)

    return _Matrix(shape, values)


def _embeddings(program: Any) -> Iterator[_Matrix]:
    """Yield the tables of the program's embedding operators."""
    plan = program.execution_plan[0]
    for instruction in (each.instr_args for chain in plan.chains for each in chain.instructions):
        if not isinstance(instruction, schema.KernelCall):
            continue
        name = plan.operators[instruction.op_index].name
        if "embedding" not in name:
            continue
        table, scales = (_constant(program, plan.values[index].val) for index in instruction.args[:2])
        if "quantized" not in name:
            yield _Matrix((len(table), table.shape[1]), table.float)
            continue
        bits = 4 if "4bit" in name else 8
        columns = table.shape[1] * 8 // bits
        yield _Matrix((len(table), columns), partial(dequantized_table, table, scales, bits))


def _constant(program: Any, value: Any) -> Tensor:
    """Return a constant of the program, or an empty tensor for other values."""
    if not isinstance(value, schema.Tensor) or not value.data_buffer_idx:
        return torch.empty(0)
    count = math.prod(value.sizes)
    data = _tensor(program.constant_buffer[value.data_buffer_idx].storage, DTYPES[value.scalar_type])
    return data[:count].reshape(value.sizes)  # zeros may follow, which align the next constant


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)
