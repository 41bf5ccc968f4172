"""A decoder with KV cache as an ONNX graph of onnxruntime's fused operators, built straight from the weights.

Imports no torch. Shapes: B batch, S new tokens, P past tokens, T = P + S, H hidden, Q query heads, G key/value heads,
D head_dim, V vocabulary. Inputs: input_ids [B, S], attention_mask [B, T], past_key_values.i.key/value [B, G_i, P, D];
outputs: logits [B, 1, V] of the last token, present.i.key/value [B, G_i, T, D]. Layers without attention have no cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ...train.model.architecture import LayerShape
from ..checkpoint import Checkpoint
from ..rope import rope_tables
from .quantize import Bits, IntegerMatrix, QuantizedMatrix, quantize_matrix, quantize_rows

OPSET = {"": 21, "com.microsoft": 1}
MICROSOFT = "com.microsoft"
BLOCK = 32
"""Weights per quantisation block."""
ACCURACY_LEVEL = 4
"""MatMulNBits multiplies in int8; same KL as fp32 activations and 1.5 times as fast (measured, 135M model)."""
END = np.iinfo(np.int64).max


class GraphBuilder:
    """Builds one model; `bits` says how each matrix is stored.

    `grams`: {parameter name: second moments of its inputs}, for error-compensated rounding of 4-bit matrices.
    """

    def __init__(self, checkpoint: Checkpoint, bits: Bits, grams: dict[str, np.ndarray] | None = None) -> None:
        self.checkpoint = checkpoint
        self.architecture = checkpoint.architecture
        self.bits = bits
        self.grams = grams or {}
        self.dtype = np.float16 if bits.head == 16 else np.float32
        """Of activations, caches and matrices that are not quantised; logits are fp32."""
        self.element = ir.DataType.FLOAT16 if bits.head == 16 else ir.DataType.FLOAT
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    def build(self) -> ir.Model:
        """The whole model in memory."""
        input_ids = self._input("input_ids", ir.DataType.INT64, ["batch_size", "sequence"])
        mask = self._input("attention_mask", ir.DataType.INT64, ["batch_size", "total"])
        self.last_position, self.total_length = self._lengths(mask)
        cos, sin = rope_tables(self.checkpoint.rope, self.architecture.head_dim, self.checkpoint.context_length)
        self.cos, self.sin = (
            self._constant("cos", cos.astype(self.dtype)),
            self._constant("sin", sin.astype(self.dtype)),
        )
        tied = self.architecture.tie_word_embeddings
        head = self._matrix("model.embed_tokens.weight" if tied else "lm_head.weight", self.bits.head)
        residual: ir.Value = self._embed(input_ids, head if tied else None)
        added: ir.Value | None = None
        for index, layer in enumerate(self.architecture.layers):
            prefix = f"model.layers.{index}"
            if layer.num_attention_heads:
                normed, residual = self._norm(f"{prefix}.input_layernorm", residual, added)
                added = self._attention(index, layer, normed)
            if layer.intermediate_size:
                normed, residual = self._norm(f"{prefix}.post_attention_layernorm", residual, added)
                added = self._feed_forward(prefix, normed)
        normed, _ = self._norm("model.norm", residual, added)
        self._head(normed, head)
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports=OPSET,
            name="decoder",
        )
        graph.sort()
        return ir.Model(graph, ir_version=10, producer_name="efficientllm")

    # -- values and nodes

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

    def _weights(self, name: str) -> ir.Value:
        return self._constant(name, self.checkpoint.tensor(name).astype(self.dtype))

    def _ints(self, *values: int) -> ir.Value:
        name = "ints_" + "_".join(map(str, values))
        known = next((value for value in self.initializers if value.name == name), None)
        return known if known is not None else self._constant(name, np.asarray(values, dtype=np.int64))

    def _node(
        self,
        kind: str,
        inputs: list[ir.Value | None],
        domain: str = "",
        count: int = 1,
        unused: tuple[int, ...] = (),
        **attributes: Any,
    ) -> Any:
        """The node's output, or its `count` outputs; `unused` ones get no name, so that kernels need not write them."""
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=count, name=f"{kind}_{len(self.nodes)}")
        for position, output in enumerate(node.outputs):
            output.name = "" if position in unused else f"{node.name}_{position}"
        self.nodes.append(node)
        return node.outputs[0] if count == 1 else node.outputs

    # -- parts of the model

    def _lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(index of the last valid token per sequence [B], total length), both int32."""
        valid = self._node("ReduceSum", [mask, self._ints(1)], keepdims=0)
        last = self._node("Cast", [self._node("Sub", [valid, self._ints(1)])], to=int(ir.DataType.INT32))
        total = self._node("Gather", [self._node("Shape", [mask]), self._constant("one", np.asarray(1, np.int64))])
        return last, self._node("Cast", [total], to=int(ir.DataType.INT32))

    def _embed(self, input_ids: ir.Value, tied: Any) -> ir.Value:
        name, bits = "model.embed_tokens.weight", self.bits.head
        if self.bits.dynamic:
            return self._embed_columns(tied if tied is not None else self._matrix(name, bits), input_ids)
        if bits >= 16:
            table = tied if tied is not None else self._weights(name)
            return self._node("Gather", [table, input_ids], axis=0)
        matrix: QuantizedMatrix = tied if tied is not None else self._matrix(name, bits)
        rows = matrix.blocks * BLOCK * bits // 8
        data = self._node("Reshape", [matrix.data, self._ints(matrix.rows, rows)])
        scales = self._node("Reshape", [matrix.scales, self._ints(matrix.rows, matrix.blocks)])
        embedded = self._node(
            "GatherBlockQuantized",
            [data, input_ids, scales],
            MICROSOFT,
            bits=bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )
        if matrix.blocks * BLOCK == matrix.columns:
            return embedded
        return self._node("Slice", [embedded, self._ints(0), self._ints(matrix.columns), self._ints(2)])

    def _embed_columns(self, matrix: IntegerMatrix, input_ids: ir.Value) -> ir.Value:
        """Columns of the matrix as the head multiplies it, in standard operators."""
        columns = self._node("Gather", [matrix.codes, input_ids], axis=1)
        codes = self._node("Transpose", [columns], perm=[1, 2, 0])
        scale = self._node("Unsqueeze", [self._node("Gather", [matrix.scales, input_ids], axis=0), self._ints(2)])
        return self._node("Mul", [self._node("Cast", [codes], to=int(ir.DataType.FLOAT)), scale])

    def _norm(self, name: str, residual: ir.Value, added: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """(normalised, residual stream): the pending addition is done by the same kernel."""
        gain = self._weights(f"{name}.weight")
        eps = self.checkpoint.rms_norm_eps
        if added is None:
            return self._node("SimplifiedLayerNormalization", [residual, gain], axis=-1, epsilon=eps), residual
        outputs = self._node(
            "SkipSimplifiedLayerNormalization",
            [residual, added, gain],
            MICROSOFT,
            count=4,
            unused=(1, 2),  # mean and inverse deviation: 3 % of the decode time where they are named
            epsilon=eps,
        )
        return outputs[0], outputs[3]

    def _attention(self, index: int, layer: LayerShape, x: ir.Value) -> ir.Value:
        prefix, head_dim = f"model.layers.{index}.self_attn", self.architecture.head_dim
        projections = [f"{prefix}.{name}_proj" for name in "qkv"]
        query, key, value = self._queries_keys_values(projections, x)
        if self.architecture.qk_norm:
            query = self._head_norm(f"{prefix}.q_norm", query, layer.num_attention_heads)
            key = self._head_norm(f"{prefix}.k_norm", key, layer.num_key_value_heads)
        shape: list[int | str] = ["batch_size", layer.num_key_value_heads, "past", head_dim]
        past = [self._input(f"past_key_values.{index}.{part}", self.element, shape) for part in ("key", "value")]
        attended, present_key, present_value = self._node(
            "GroupQueryAttention",
            [query, key, value, *past, self.last_position, self.total_length, self.cos, self.sin],
            MICROSOFT,
            count=3,
            num_heads=layer.num_attention_heads,
            kv_num_heads=layer.num_key_value_heads,
            scale=head_dim**-0.5,
            do_rotary=1,
            rotary_interleaved=0,
        )
        shape[2] = "total"
        self._output(present_key, f"present.{index}.key", shape, self.element)
        self._output(present_value, f"present.{index}.value", shape, self.element)
        return self._project(f"{prefix}.o_proj", attended, self.bits.attention)

    def _queries_keys_values(self, names: list[str], x: ir.Value) -> list[Any]:
        """The three products, or all of them in the first: GroupQueryAttention takes them packed.

        One product quantises the activations once and wakes the threads once; the norms of qwen3 want them apart.
        """
        bits = self.bits.attention
        if bits >= 16 or self.bits.dynamic or self.architecture.qk_norm:
            return [self._project(name, x, bits) for name in names]
        product = self._multiply(x, self._matrix([f"{name}.weight" for name in names], bits))
        if self.checkpoint.has_tensor(f"{names[0]}.bias"):
            biases = [self.checkpoint.tensor(f"{name}.bias").astype(self.dtype) for name in names]
            product = self._node("Add", [product, self._constant(f"{names[0]}.kv.bias", np.concatenate(biases))])
        return [product, None, None]

    def _head_norm(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        head_dim = self.architecture.head_dim
        split = self._node("Reshape", [x, self._ints(0, 0, heads, head_dim)])
        gain = self._weights(f"{name}.weight")
        normed = self._node("SimplifiedLayerNormalization", [split, gain], axis=-1, epsilon=self.checkpoint.qk_norm_eps)
        return self._node("Reshape", [normed, self._ints(0, 0, heads * head_dim)])

    def _feed_forward(self, prefix: str, x: ir.Value) -> ir.Value:
        gate = self._project(f"{prefix}.mlp.gate_proj", x, self.bits.gate_up)
        up = self._project(f"{prefix}.mlp.up_proj", x, self.bits.gate_up)
        silu = self._node("QuickGelu", [gate], MICROSOFT, alpha=1.0)  # x sigmoid(x)
        return self._project(f"{prefix}.mlp.down_proj", self._node("Mul", [silu, up]), self.bits.down)

    def _head(self, x: ir.Value, head: Any) -> None:
        last = self._node("Slice", [x, self._ints(-1), self._ints(END), self._ints(1)])
        if self.bits.head >= 16:  # Gemm reads the embedding as it is; MatMul would want a transposed copy
            flat = self._node("Reshape", [last, self._ints(-1, self.architecture.hidden_size)])
            product = self._node("Gemm", [flat, head], transB=1)
            logits = self._node("Unsqueeze", [product, self._ints(1)])
        else:
            logits = self._multiply(last, head)
        if self.element != ir.DataType.FLOAT:
            logits = self._node("Cast", [logits], to=int(ir.DataType.FLOAT))
        self._output(logits, "logits", ["batch_size", 1, self.architecture.vocab_size], ir.DataType.FLOAT)

    # -- matrices

    def _matrix(self, name: str | list[str], bits: int) -> Any:
        """[rows, columns] as stored, or its quantised form; several matrices below each other where there is a list."""
        names = [name] if isinstance(name, str) else name
        if bits >= 16:
            return self._weights(names[0])
        if self.bits.dynamic:
            codes, scales = quantize_rows(self.checkpoint.tensor(names[0]))
            stored = [self._constant(f"{names[0]}.q8", codes.T), self._constant(f"{names[0]}.scales", scales)]
            return IntegerMatrix(*stored)
        arrays = [self.checkpoint.tensor(part) for part in names]
        grams = [self.grams.get(part) if bits == 4 else None for part in names]
        parts = [quantize_matrix(array, bits, BLOCK, gram) for array, gram in zip(arrays, grams, strict=True)]
        data, scales = (np.concatenate(stacked) for stacked in zip(*parts, strict=True))
        stored = [self._constant(f"{names[0]}.q{bits}", data), self._constant(f"{names[0]}.scales", scales)]
        return QuantizedMatrix(*stored, rows=len(data), columns=arrays[0].shape[1], bits=bits, block=BLOCK)

    def _project(self, name: str, x: ir.Value, bits: int) -> ir.Value:
        """x W^T (+ b) of a linear layer."""
        if bits >= 16:
            weight = self._constant(f"{name}.weight", self.checkpoint.tensor(f"{name}.weight").T.astype(self.dtype))
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
            block_size=matrix.block,
            accuracy_level=ACCURACY_LEVEL,
        )

    def _multiply_integers(self, x: ir.Value, matrix: IntegerMatrix) -> ir.Value:
        """x W^T in int8: onnxruntime fuses these nodes into one."""
        quantized, scale, zero = self._node("DynamicQuantizeLinear", [x], count=3)
        product = self._node("MatMulInteger", [quantized, matrix.codes, zero])
        factor = self._node("Mul", [scale, matrix.scales])
        return self._node("Mul", [self._node("Cast", [product], to=int(ir.DataType.FLOAT)), factor])
