"""Values, nodes and matrices of an ONNX graph that is built from a checkpoint. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ...train.model.tensors import split_name
from ..checkpoint import Checkpoint
from .quantize import (
    BLOCK,
    Bits,
    IntegerMatrix,
    QuantizedMatrix,
    head_places,
    quantize_matrix,
    quantize_rows,
    stored_head_dim,
)

MICROSOFT = "com.microsoft"
ACCURACY_LEVEL = 4
"""MatMulNBits multiplies in int8, with the same KL as fp32 activations and 1.5 times as fast (measured, 135M model)."""


class GraphValues:
    """A graph with methods to add nodes. `bits` gives the storage of each matrix.

    `grams` is {parameter name: second moments of its inputs}, for error-compensated rounding of 4-bit matrices.
    """

    def __init__(self, checkpoint: Checkpoint, bits: Bits, grams: dict[str, np.ndarray] | None = None) -> None:
        self.checkpoint = checkpoint
        self.architecture = checkpoint.architecture
        self.parts, self.scales = checkpoint.architecture.parts, checkpoint.scales
        self.head_dim = stored_head_dim(checkpoint)
        self.head_growth = self.head_dim / self.architecture.head_dim
        """Norms over heads divide by the padded width, which their gains and eps correct (train/model/rescaling.py)."""
        self.bits = bits
        self.grams = grams or {}
        self.dtype = np.float16 if bits.head == 16 else np.float32
        """Type of activations, caches and unquantised matrices; logits are fp32."""
        self.element = ir.DataType.FLOAT16 if bits.head == 16 else ir.DataType.FLOAT
        self.tables: dict[str, list[ir.Value]] = {}
        """Rotary tables by LayerAttention.rotary_key."""
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    def _input(self, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def _output(self, value: ir.Value, name: str, shape: list[int | str], dtype: ir.DataType) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(value)

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        shape = ir.Shape(array.shape)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.initializers.append(value)
        return value

    def _tensor(self, name: str) -> np.ndarray:
        """Return a tensor of the checkpoint with the heads of the graph."""
        array, (layer, suffix) = self.checkpoint.tensor(name), split_name(name)
        if layer is None or not suffix.startswith("self_attn."):
            return array
        module = suffix.split(".")[1]
        places = head_places(self.checkpoint, layer, module[0])
        if module == "o_proj":  # its inputs are heads, and its bias has none
            return places.widen(array.T).T if array.ndim > 1 else array
        growth = self.head_growth**0.5 if module.endswith("norm") else 1
        return places.widen(array) / np.float32(growth)

    def _gram(self, name: str) -> np.ndarray | None:
        """Return the second moments of a matrix's inputs with the heads of the graph, or None."""
        gram, (layer, suffix) = self.grams.get(name), split_name(name)
        if gram is None or layer is None or not suffix.endswith("o_proj.weight"):
            return gram
        places = head_places(self.checkpoint, layer, "o")
        widened_rows = places.widen(gram)
        return places.widen(widened_rows.T)  # symmetric, so transposed once is the same

    def _weights(self, name: str) -> ir.Value:
        return self._constant(name, self._tensor(name).astype(self.dtype))

    def _ints(self, *values: int) -> ir.Value:
        """Return int64 numbers of one axis."""
        return self._known("ints_" + "_".join(map(str, values)), np.asarray(values, dtype=np.int64))

    def _scalar(self, value: int) -> ir.Value:
        """Return an int64 number without axes."""
        return self._known(f"scalar_{value}", np.asarray(value, dtype=np.int64))

    def _known(self, name: str, array: np.ndarray) -> ir.Value:
        """Return the constant of that name, which is made once."""
        known = next((value for value in self.initializers if value.name == name), None)
        return known if known is not None else self._constant(name, array)

    def _node(
        self,
        kind: str,
        inputs: list[ir.Value | None],
        domain: str = "",
        count: int = 1,
        unused: tuple[int, ...] = (),
        **attributes: Any,
    ) -> Any:
        """Return the node's output, or its `count` outputs."""
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=count, name=f"{kind}_{len(self.nodes)}")
        # kernels need not write an output without a name
        for position, output in enumerate(node.outputs):
            output.name = "" if position in unused else f"{node.name}_{position}"
        self.nodes.append(node)
        return node.outputs[0] if count == 1 else node.outputs

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> Any:
        return self._node("Cast", [value], to=int(dtype))

    def _matrix(self, name: str | list[str], bits: int) -> Any:
        """Return the matrix [rows, columns] as stored, or its quantised form. A list is stacked by rows."""
        names = [name] if isinstance(name, str) else name
        if bits >= 16:
            return self._weights(names[0])
        if self.bits.dynamic:
            codes, scales = quantize_rows(self._tensor(names[0]))
            stored = [self._constant(f"{names[0]}.q8", codes.T), self._constant(f"{names[0]}.scales", scales)]
            return IntegerMatrix(*stored)
        all_codes, all_scales, columns = [], [], 0
        for part in names:
            array = self._tensor(part)
            gram = self._gram(part) if bits == 4 else None
            codes, scales = quantize_matrix(array, bits, gram)
            all_codes.append(codes)
            all_scales.append(scales)
            columns = array.shape[1]
        data = np.concatenate(all_codes)
        stored_codes = self._constant(f"{names[0]}.q{bits}", data)
        stored_scales = self._constant(f"{names[0]}.scales", np.concatenate(all_scales))
        return QuantizedMatrix(stored_codes, stored_scales, rows=len(data), columns=columns, bits=bits)

    def _project(self, name: str, x: ir.Value, bits: int) -> ir.Value:
        """Return x W^T (+ b) of a linear layer."""
        if bits >= 16:
            weight = self._constant(f"{name}.weight", self._tensor(f"{name}.weight").T.astype(self.dtype))
            product = self._node("MatMul", [x, weight])
        else:
            product = self._multiply(x, self._matrix(f"{name}.weight", bits))
        if not self.checkpoint.has_tensor(f"{name}.bias"):
            return product
        return self._node("Add", [product, self._weights(f"{name}.bias")])

    def _multiply(self, x: ir.Value, matrix: QuantizedMatrix | IntegerMatrix) -> ir.Value:
        if isinstance(matrix, IntegerMatrix):
            return self._multiply_integers(x, matrix)
        return self._node(
            "MatMulNBits",
            [x, matrix.data, matrix.scales],
            MICROSOFT,
            K=matrix.columns,
            N=matrix.rows,
            bits=matrix.bits,
            block_size=BLOCK,
            accuracy_level=ACCURACY_LEVEL,
        )

    def _multiply_integers(self, x: ir.Value, matrix: IntegerMatrix) -> ir.Value:
        """Return x W^T in int8."""
        # in this order, onnxruntime fuses the nodes into one
        quantized, scale, zero = self._node("DynamicQuantizeLinear", [x], count=3)
        product = self._node("MatMulInteger", [quantized, matrix.codes, zero])
        factor = self._node("Mul", [scale, matrix.scales])
        return self._node("Mul", [self._cast(product, ir.DataType.FLOAT), factor])
