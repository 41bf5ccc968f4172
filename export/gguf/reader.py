"""Read the tensors of a written GGUF back, dequantised, under our names. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...runtime.base.gguf_header import TensorInfo, read_header
from ...train.model.rotary import unpermute_rope
from ...train.model.tensors import split_name, tensor_names, tensor_shape
from ..checkpoint import Checkpoint
from ..verification import StoredWeights
from .layout import GgufPlan
from .q2_0 import TENSOR_TYPE as Q2_0
from .tensor_data import values
from .writer import QKV, gguf_name, query_gain

ROUNDINGS = {"F16": "f16", "BF16": "bf16", "K": "q8_k", "": "q8_0"}
"""End of a tensor type's name -> how llama.cpp's CPU kernels round the inputs of its products (vec_dot_type)."""


def read_weights(path: Path, checkpoint: Checkpoint, plan: GgufPlan) -> StoredWeights:
    """Return the weights of the file at `path`, which was written by `plan`."""
    header = {tensor.name: tensor for tensor in read_header(path).tensors}
    tensors, roundings = {}, {}
    for name in tensor_names(plan.architecture):
        tensor = header[gguf_name(name, plan)]
        array = values(path, tensor)
        if plan.fuses_qkv and name.endswith(QKV):
            array = _part_of_fused(array, name, plan)
        tensors[name] = array = _restored(array.reshape(tensor_shape(plan.architecture, name)), name, checkpoint, plan)
        kind = _rounding(tensor)
        if kind and array.ndim > 1:
            roundings[name] = kind
    return StoredWeights(plan.architecture, plan.scales, tensors, roundings, "codes of the file, by gguf-py")


def _rounding(tensor: TensorInfo) -> str:
    """Return how the inputs of a tensor's products are rounded, a value of ROUNDINGS or an empty string."""
    import gguf

    name = "Q2_0" if tensor.kind == Q2_0 else gguf.GGMLQuantizationType(tensor.kind).name
    if name in ("F32", "F16", "BF16"):
        return ROUNDINGS.get(name, "")
    return ROUNDINGS["K" if name.endswith("_K") or (name.startswith("IQ") and name != "IQ4_NL") else ""]


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
