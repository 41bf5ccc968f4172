"""Read the tensors of a written GGUF as numbers, and check them.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...runtime.base.errors import ArtefactError
from ...runtime.base.gguf_header import TensorInfo, read_header
from ...train.model.file_types import LEAST_ROW
from ...train.model.rotary import unpermute_rope
from ...train.model.tensors import split_name, tensor_names, tensor_shape
from ..checkpoint import Checkpoint
from ..verification import StoredWeights
from .layout import GgufPlan
from .writer import QKV, gguf_name, query_gain

ROUNDINGS = {"F16": "f16", "BF16": "bf16", "K": "q8_k", "": "q8_0"}
"""End of a tensor type's name -> how llama.cpp's CPU kernels round the inputs of its products (vec_dot_type)."""


def tensor_bytes(path: Path) -> int:
    """Return the bytes of all tensors, without the header and the vocabulary."""
    return sum(num_bytes(tensor) for tensor in read_header(path).tensors)


def num_bytes(tensor: TensorInfo) -> int:
    weights, size = block_of(tensor.kind)
    return tensor.num_elements // weights * size


def block_of(kind: int) -> tuple[int, int]:
    """Return (weights, bytes) of a block."""
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]


def _raw(path: Path, tensor: TensorInfo) -> np.ndarray:
    """Return uint8 [rows, bytes]."""
    data = np.memmap(path, np.uint8, "r", tensor.offset, (num_bytes(tensor),))
    return data.reshape(-1 if len(tensor.shape) > 1 else 1, num_bytes(tensor) // _rows(tensor))


def _rows(tensor: TensorInfo) -> int:
    return tensor.num_elements // tensor.shape[-1]


def values(path: Path, tensor: TensorInfo) -> np.ndarray:
    """Return fp32 [rows, columns], as llama.cpp reads the tensor."""
    import gguf

    data = _raw(path, tensor)
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType(tensor.kind)).reshape(_rows(tensor), -1)


def changed_tensors(exact: Path, target: Path) -> Iterator[tuple[str, float]]:
    """Yield (name, largest difference) of every tensor that differs between the files."""
    originals = {tensor.name: tensor for tensor in read_header(exact).tensors}
    for tensor in read_header(target).tensors:
        difference = float(np.abs(values(exact, originals[tensor.name]) - values(target, tensor)).max())
        if difference:
            yield tensor.name, difference


def check_rows(path: Path) -> None:
    """Raise ArtefactError where a quantised matrix has rows that CPUs with AMX multiply wrongly, see LEAST_ROW."""
    # from the header, as no run on another CPU would show it
    for tensor in read_header(path).tensors:
        weights, _ = block_of(tensor.kind)
        if weights > 1 and tensor.shape[-1] < LEAST_ROW:
            raise ArtefactError(
                f"gguf: {tensor.name} has quantised rows of {tensor.shape[-1]} weights, which llama.cpp multiplies "
                "wrongly on CPUs with AMX; this is an error of the exporter, and --quantize f16 avoids it"
            )


def check_kept(exact: Path, target: Path, kind: str) -> None:
    """Raise ArtefactError unless the file has the trained weights to the bit."""
    first = next(changed_tensors(exact, target), None)
    if first is not None:
        raise ArtefactError(
            f"gguf: the checkpoint says that it was trained for {kind}, but {first[0]} is not on that grid (off by "
            f"{first[1]:.1e}); was it changed after training? --quantize with another type exports it anyway"
        )


def read_weights(path: Path, checkpoint: Checkpoint, plan: GgufPlan) -> StoredWeights:
    """Return the weights of the file at `path`, which was written by `plan`."""
    header = {tensor.name: tensor for tensor in read_header(path).tensors}
    tensors, roundings = {}, {}
    for name in tensor_names(plan.architecture):
        tensor = header[gguf_name(name, plan)]
        array = values(path, tensor)
        if plan.fuses_qkv and name.endswith(QKV):
            array = _part_of_fused(array, name, plan)
        array = array.reshape(tensor_shape(plan.architecture, name))
        tensors[name] = array = _restored(array, name, checkpoint, plan)
        kind = _rounding(tensor)
        if kind and array.ndim > 1:
            roundings[name] = kind
    return StoredWeights(plan.architecture, plan.scales, tensors, roundings, "codes of the file, by gguf-py")


def _rounding(tensor: TensorInfo) -> str:
    """Return how the inputs of a tensor's products are rounded, a value of ROUNDINGS or an empty string."""
    import gguf

    name = gguf.GGMLQuantizationType(tensor.kind).name
    if name in ("F32", "F16", "BF16"):
        return ROUNDINGS.get(name, "")
    # IQ types have super-blocks of 256 as K-quants, except IQ4_NL with its blocks of 32
    has_super_blocks = name.endswith("_K") or (name.startswith("IQ") and name != "IQ4_NL")
    return ROUNDINGS["K" if has_super_blocks else ""]


def _part_of_fused(array: np.ndarray, name: str, plan: GgufPlan) -> np.ndarray:
    """Return q, k or v of a fused tensor, whose rows follow each other."""
    layer, suffix = split_name(name)
    prefix, kind = f"model.layers.{layer}.self_attn", suffix.rpartition(".")[2]
    rows = [tensor_shape(plan.architecture, f"{prefix}.{part}_proj.{kind}")[0] for part in "qkv"]
    index = "qkv".index(suffix.removeprefix("self_attn.")[0])
    start = sum(rows[:index])
    return array.reshape(sum(rows), -1)[start : start + rows[index]]


def _restored(array: np.ndarray, name: str, checkpoint: Checkpoint, plan: GgufPlan) -> np.ndarray:
    """Return a tensor with the order and scale of rows that the writer changed."""
    if name.endswith("q_norm.weight"):
        return array / query_gain(checkpoint, plan)
    if plan.permutes_rope and (".q_proj." in name or ".k_proj." in name):
        return unpermute_rope(array, len(array) // plan.architecture.head_dim)
    return array
