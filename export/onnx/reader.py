"""Read the weights of a written graph back, dequantised, under our names, and run the graph on a padded batch.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...train.model.tensors import split_name, tensor_names, tensor_shape
from ..checkpoint import Checkpoint
from ..verification import EngineRun, StoredWeights
from .quantize import Bits, head_places, stored_head_dim

BATCH_TITLE = "a batch of two prompts of unequal lengths, padded on the right, and their next tokens"


def read_weights(path: Path, checkpoint: Checkpoint, bits: Bits) -> StoredWeights:
    """Return the weights of the graph at `path`, which was built with `bits`."""
    import onnx_ir as ir

    initializers = ir.load(path).graph.initializers
    arrays = {name: value.const_value.numpy() for name, value in initializers.items() if value.const_value}
    tensors, roundings, architecture = {}, {}, checkpoint.architecture
    for name in tensor_names(architecture):
        tensors[name] = _narrow(_stored(name, arrays, checkpoint), name, checkpoint)
        if name not in arrays and tensors[name].ndim > 1:
            roundings[name] = "int8 per tensor" if bits.dynamic else "int8 in blocks of 32"
        elif bits.head == 16:
            roundings[name] = "f16 throughout"
    return StoredWeights(architecture, checkpoint.scales, tensors, roundings, "codes of the file, by onnx_ir")


def _stored(name: str, arrays: dict[str, np.ndarray], checkpoint: Checkpoint) -> np.ndarray:
    """Return a tensor as the graph has it, with the heads of the graph."""
    if name in arrays:
        array = arrays[name].astype(np.float32)
        return array.T if name.endswith("_proj.weight") else array
    for bits in (4, 8):
        if f"{name}.q{bits}" in arrays:
            return _dequantized(arrays[f"{name}.q{bits}"], arrays[f"{name}.scales"], bits)
    # q, k and v are one matrix, under the name of q
    layer, suffix = split_name(name)
    prefix, kind = f"model.layers.{layer}.self_attn", suffix.rpartition(".")[2]
    first = f"{prefix}.q_proj"
    whole = arrays[f"{first}.kv.bias"] if kind == "bias" else _stored(f"{first}.weight", arrays, checkpoint)
    growth = stored_head_dim(checkpoint) / checkpoint.architecture.head_dim
    rows = []
    for part in "qkv":
        count, *_ = tensor_shape(checkpoint.architecture, f"{prefix}.{part}_proj.{kind}")
        rows.append(round(growth * count))
    index = "qkv".index(suffix.removeprefix("self_attn.")[0])
    start = sum(rows[:index])
    return whole[start : start + rows[index]].astype(np.float32)


def _dequantized(codes: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """Return fp32 [rows, columns] of MatMulNBits' blocks, or of MatMulInteger's int8 [columns, rows]."""
    if codes.dtype == np.int8:
        return codes.T.astype(np.float32) * scales[:, None]
    if bits == 4:
        halves = np.stack([codes & 15, codes >> 4], -1)
        codes = halves.reshape(*codes.shape[:2], -1)
    values = (codes.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    return values.reshape(len(values), -1)


def _narrow(array: np.ndarray, name: str, checkpoint: Checkpoint) -> np.ndarray:
    """Return a tensor with the heads of the checkpoint and without the columns that fill the last block."""
    architecture, (layer, suffix) = checkpoint.architecture, split_name(name)
    if layer is not None and suffix.startswith("self_attn."):
        module = suffix.split(".")[1]
        places = head_places(checkpoint, layer, module[0])
        if module == "o_proj":
            whole = array.shape[-1] // places.width * places.width  # without the columns behind the last head
            array = places.narrow(array[:, :whole].T).T if array.ndim > 1 else array
        elif module.endswith("norm"):
            array = places.narrow(array) * np.float32((places.width / architecture.head_dim) ** 0.5)
        else:
            array = places.narrow(array)
    return array[tuple(slice(count) for count in tensor_shape(architecture, name))]


def run_padded_batch(path: Path, tokens: list[int]) -> EngineRun:
    """Run two beginnings of the sample, the shorter one first and padded, and then the next token of each."""
    import onnxruntime

    sample = np.array(tokens)
    lengths = np.array([max(1, len(tokens) // 3), max(1, len(tokens) // 2)])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    is_valid = np.arange(lengths[1])[None] < lengths[:, None]
    feeds: dict[str, Any] = {"input_ids": np.where(is_valid, sample[None, : lengths[1]], 0)}
    for value in session.get_inputs()[2:]:  # the caches, which follow ids and mask
        dtype = np.float16 if value.type == "tensor(float16)" else np.float32
        _, heads, _, head_dim = value.shape
        feeds[value.name] = np.zeros((2, heads, 0, head_dim), dtype)
    names, rows = [value.name for value in session.get_outputs()], []
    for _ in range(2):  # a prompt, then one token
        feeds["attention_mask"] = is_valid.astype(np.int64)
        outputs: dict[str, Any] = dict(zip(names, session.run(names, feeds), strict=True))
        rows.append(outputs.pop("logits")[:, 0])
        feeds = {name.replace("present", "past_key_values"): cache for name, cache in outputs.items()}
        feeds["input_ids"] = sample[lengths][:, None]
        is_valid = np.pad(is_valid, ((0, 0), (0, 1)), constant_values=True)
    positions = [*(lengths - 1).tolist(), *lengths.tolist()]
    return EngineRun(BATCH_TITLE, positions, np.concatenate(rows))
