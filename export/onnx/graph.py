"""Build a decoder with KV cache as an ONNX graph of onnxruntime's fused operators, from the weights.

Shapes: B batch, S new tokens, P past tokens, T = P + S, H hidden, Q query heads, G key/value heads, D head_dim (padded
to 16), V vocabulary. Inputs: input_ids [B, S], attention_mask [B, T], past_key_values.i.key/value [B, G_i, P, D].
Outputs: logits [B, 1, V] of the last valid token, present.i.key/value [B, G_i, T, D]. Layers
without attention have no cache. Prompts of a batch may be padded on the right, with zeros in their mask. The fused
attention does not support padding on the left. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ...train.model.architecture import LayerShape
from ...train.model.attention import LayerAttention
from ...train.model.families import Place
from ...train.model.rotary import widened_tables
from ...train.model.tensors import FINAL_NORM
from .graph_values import MICROSOFT, GraphValues
from .quantize import BLOCK, IntegerMatrix, QuantizedMatrix

OPSET = {"": 21, "com.microsoft": 1}


@dataclass(frozen=True)
class Stem:
    """The residual stream as a sum that may be still pending."""

    total: ir.Value
    added: ir.Value | None = None


class GraphBuilder(GraphValues):
    """Builder of one model."""

    def build(self) -> ir.Model:
        """Return the whole model in memory."""
        input_ids = self._input("input_ids", ir.DataType.INT64, ["batch_size", "sequence"])
        mask = self._input("attention_mask", ir.DataType.INT64, ["batch_size", "total"])
        self.last_position, self.total_length = self._lengths(mask)
        tied = self.architecture.tie_word_embeddings
        head = self._matrix("model.embed_tokens.weight" if tied else "lm_head.weight", self.bits.head)
        stem = Stem(self._scaled(self._embed(input_ids, head if tied else None), self.scales.embedding))
        for index, layer in enumerate(self.architecture.layers):
            stem = self._layer(index, layer, stem)
        normed, _ = self._norm(FINAL_NORM, stem)
        self._head(normed, input_ids, head)
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

    def _lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return (index of the last valid token per sequence [B], total length), both int32."""
        valid = self._node("ReduceSum", [mask, self._ints(1)], keepdims=0)
        last = self._node("Sub", [valid, self._ints(1)])
        last = self._cast(last, ir.DataType.INT32)
        shape = self._node("Shape", [mask])
        total = self._node("Gather", [shape, self._scalar(1)])
        return last, self._cast(total, ir.DataType.INT32)

    def _embed(self, input_ids: ir.Value, tied: Any) -> ir.Value:
        # a tied matrix is stored once, in the layout of the head's product
        matrix = tied if tied is not None else self._matrix("model.embed_tokens.weight", self.bits.head)
        if self.bits.dynamic:
            return self._embed_columns(matrix, input_ids)
        if self.bits.head >= 16:
            return self._node("Gather", [matrix, input_ids], axis=0)
        return self._embed_blocks(matrix, input_ids)

    def _embed_blocks(self, matrix: QuantizedMatrix, input_ids: ir.Value) -> ir.Value:
        """Return rows of a matrix as embeddings, in standard operators."""
        # not by GatherBlockQuantized, which some runtimes lack
        stored = self._node("Gather", [matrix.data, input_ids], axis=0)
        codes = self._cast(stored, ir.DataType.FLOAT)
        if matrix.bits == 4:
            codes = self._unpacked(stored, codes)
        zero = self._constant("zero_code", np.array(1 << (matrix.bits - 1), np.float32))
        centred = self._node("Sub", [codes, zero])
        scales = self._node("Gather", [matrix.scales, input_ids], axis=0)
        scales = self._node("Unsqueeze", [scales, self._ints(-1)])
        values = self._node("Mul", [centred, scales])
        width = matrix.blocks * BLOCK
        embedded = self._node("Reshape", [values, self._ints(0, 0, width)])
        if width == matrix.columns:
            return embedded
        # the last block is filled up with zeros
        return self._node("Slice", [embedded, self._ints(0), self._ints(matrix.columns), self._ints(2)])

    def _unpacked(self, stored: ir.Value, numbers: ir.Value) -> ir.Value:
        """Return the codes of bytes with two each, whose low half is the first. `numbers` are the bytes as fp32."""
        half_byte = self._constant("half_byte", np.array(15, np.uint8))
        low = self._node("BitwiseAnd", [stored, half_byte])
        low = self._cast(low, ir.DataType.FLOAT)
        # the high half by arithmetic, because OpenVINO's BitShift rounds
        sixteenth = self._constant("sixteenth", np.array(1 / 16, np.float32))
        high = self._node("Sub", [numbers, low])
        high = self._node("Mul", [high, sixteenth])
        halves = [self._node("Unsqueeze", [half, self._ints(-1)]) for half in (low, high)]
        pairs = self._node("Concat", halves, axis=-1)
        return self._node("Reshape", [pairs, self._ints(0, 0, 0, BLOCK)])

    def _embed_columns(self, matrix: IntegerMatrix, input_ids: ir.Value) -> ir.Value:
        """Return columns of the head's matrix as embeddings, in standard operators."""
        columns = self._node("Gather", [matrix.codes, input_ids], axis=1)
        codes = self._node("Transpose", [columns], perm=[1, 2, 0])
        scale = self._node("Gather", [matrix.scales, input_ids], axis=0)
        scale = self._node("Unsqueeze", [scale, self._ints(2)])
        return self._node("Mul", [self._cast(codes, ir.DataType.FLOAT), scale])

    def _layer(self, index: int, layer: LayerShape, stem: Stem) -> Stem:
        """Return the stem after a layer."""
        prefix, parallel = f"model.layers.{index}", self.parts.is_parallel
        before = None
        if layer.num_attention_heads:
            read, before = self._read(prefix, "before_attention", stem)
            attended = self._attention(index, layer, read)
            stem = Stem(before.total, self._written(prefix, "after_attention", attended))
        if layer.intermediate_size:
            # with parallel blocks the FFN reads the stem from before the attention
            read, after = self._read(prefix, "before_ffn", before if parallel and before is not None else stem)
            total = self._sum(stem) if parallel else after.total
            fed_forward = self._feed_forward(prefix, read)
            stem = Stem(total, self._written(prefix, "after_ffn", fed_forward))
        return stem

    def _sum(self, stem: Stem) -> ir.Value:
        return stem.total if stem.added is None else self._node("Add", [stem.total, stem.added])

    def _read(self, prefix: str, place: Place, stem: Stem) -> tuple[ir.Value, Stem]:
        """Return (input of a block, the stem without a pending addition)."""
        name = self.parts.norms.get(place)
        if name is not None:
            return self._norm(f"{prefix}.{name}", stem)
        total = self._sum(stem)
        return total, Stem(total)

    def _written(self, prefix: str, place: Place, x: ir.Value) -> ir.Value:
        """Return the output of a block, normalised if the family does so."""
        name = self.parts.norms.get(place)
        return x if name is None else self._norm(f"{prefix}.{name}", Stem(x))[0]

    def _norm(self, name: str, stem: Stem) -> tuple[ir.Value, Stem]:
        """Return (normalised, the stem without a pending addition). One kernel does the addition and the norm."""
        total, added, eps = stem.total, stem.added, self.scales.stem_eps
        if self.parts.norm.takes_mean:
            total = self._sum(stem)
            return self._layer_norm(name, total), Stem(total)
        gain = self._weights(f"{name}.weight")
        if added is None:
            return self._node("SimplifiedLayerNormalization", [total, gain], axis=-1, epsilon=eps), stem
        outputs = self._node(
            "SkipSimplifiedLayerNormalization",
            [total, added, gain],
            MICROSOFT,
            count=4,
            unused=(1, 2),  # mean and inverse deviation: 3 % of the decode time where they are named
            epsilon=eps,
        )
        return outputs[0], Stem(outputs[3])

    def _layer_norm(self, name: str, x: ir.Value) -> ir.Value:
        norm, width = self.parts.norm, self.architecture.hidden_size
        constant = np.full(width, self.scales.stem_gain, self.dtype)
        gain = self._weights(f"{name}.weight") if norm.has_gain else self._constant(f"{name}.weight", constant)
        bias = [self._weights(f"{name}.bias")] if norm.has_bias else []
        return self._node("LayerNormalization", [x, gain, *bias], axis=-1, epsilon=self.scales.stem_eps)

    def _scaled(self, x: ir.Value, factor: float) -> ir.Value:
        if factor == 1.0:
            return x
        scale = self._constant("scale", np.asarray(factor, self.dtype))
        return self._node("Mul", [x, scale])

    def _attention(self, index: int, layer: LayerShape, x: ir.Value) -> ir.Value:
        prefix = f"model.layers.{index}.self_attn"
        projections = [f"{prefix}.{name}_proj" for name in "qkv"]
        query, key, value = self._queries_keys_values(projections, x)
        if self.parts.qk_norm:
            query = self._qk_norm(f"{prefix}.q_norm", query, layer.num_attention_heads)
            key = self._qk_norm(f"{prefix}.k_norm", key, layer.num_key_value_heads)
        settings = self.checkpoint.attention[index]
        tables = self._rotary_tables(settings) if settings.rope is not None else []
        window: dict[str, Any] = {"local_window_size": settings.window} if settings.window else {}
        shape: list[int | str] = ["batch_size", layer.num_key_value_heads, "past", self.head_dim]
        past = [self._input(f"past_key_values.{index}.{part}", self.element, shape) for part in ("key", "value")]
        attended, present_key, present_value = self._node(
            "GroupQueryAttention",
            [query, key, value, *past, self.last_position, self.total_length, *tables],
            MICROSOFT,
            count=3,
            num_heads=layer.num_attention_heads,
            kv_num_heads=layer.num_key_value_heads,
            scale=settings.scale,
            do_rotary=int(settings.rope is not None),
            rotary_interleaved=0,  # Hugging Face's order of channels, in halves
            **window,
        )
        shape[2] = "total"
        self._output(present_key, f"present.{index}.key", shape, self.element)
        self._output(present_value, f"present.{index}.value", shape, self.element)
        return self._project(f"{prefix}.o_proj", attended, self.bits.attention)

    def _queries_keys_values(self, names: list[str], x: ir.Value) -> list[Any]:
        """Return the three products, or all of them packed in the first, as GroupQueryAttention accepts them.

        One product quantises the activations once and wakes the threads once. Norms of q and k need them apart.
        """
        bits = self.bits.attention
        if bits >= 16 or self.bits.dynamic or self.parts.qk_norm:
            return [self._project(name, x, bits) for name in names]
        product = self._multiply(x, self._matrix([f"{name}.weight" for name in names], bits))
        if self.checkpoint.has_tensor(f"{names[0]}.bias"):
            biases = [self._tensor(f"{name}.bias").astype(self.dtype) for name in names]
            product = self._node("Add", [product, self._constant(f"{names[0]}.kv.bias", np.concatenate(biases))])
        return [product, None, None]

    def _rotary_tables(self, settings: LayerAttention) -> list[ir.Value]:
        """Return cos and sin [C, D / 2]. Layers with the same rotary embedding share them."""
        assert settings.rope is not None
        key = settings.rotary_key
        if key not in self.tables:
            name = f"_{len(self.tables)}" if self.tables else ""
            arrays = widened_tables(settings.rope, settings.rotary_dim, self.head_dim, self.checkpoint.context_length)
            parts = zip(("cos", "sin"), arrays, strict=True)
            self.tables[key] = [self._constant(part + name, array.astype(self.dtype)) for part, array in parts]
        return self.tables[key]

    def _qk_norm(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        is_per_head, eps = self.parts.qk_norm == "head", self.scales.qk_eps / self.head_growth
        if is_per_head:
            x = self._node("Reshape", [x, self._ints(0, 0, heads, self.head_dim)])
        x = self._node("SimplifiedLayerNormalization", [x, self._weights(f"{name}.weight")], axis=-1, epsilon=eps)
        return self._node("Reshape", [x, self._ints(0, 0, heads * self.head_dim)]) if is_per_head else x

    def _feed_forward(self, prefix: str, x: ir.Value) -> ir.Value:
        names = ("gate_proj", "up_proj") if self.parts.is_gated else ("up_proj",)
        first, *rest = [self._project(f"{prefix}.mlp.{name}", x, self.bits.gate_up) for name in names]
        active = self._activation(first)
        product = self._node("Mul", [active, *rest]) if rest else active
        return self._project(f"{prefix}.mlp.down_proj", product, self.bits.down)

    def _activation(self, x: ir.Value) -> ir.Value:
        if self.parts.activation == "silu":
            return self._node("QuickGelu", [x], MICROSOFT, alpha=1.0)  # x sigmoid(x)
        formula = "tanh" if self.parts.activation == "gelu_pytorch_tanh" else "none"
        return self._node("Gelu", [x], approximate=formula)

    def _last_valid(self, x: ir.Value, input_ids: ir.Value) -> ir.Value:
        """Return the rows of x [B * S, H] of the last valid tokens, [B, H]."""
        # Rows are counted over the flat batch, because every execution provider has a plain Gather. The last valid
        # token is new, so its row is S - 1 with a past. The attention supports padding in the first call only.
        shape = self._node("Shape", [input_ids])
        length = self._node("Gather", [shape, self._scalar(1)])
        position = self._cast(self.last_position, ir.DataType.INT64)
        last_new = self._node("Sub", [length, self._scalar(1)])
        row = self._node("Min", [position, last_new])
        start = self._scalar(0)
        end = self._node("Size", [input_ids])
        first = self._node("Range", [start, end, length])
        rows = self._node("Add", [first, row])
        return self._node("Gather", [x, rows], axis=0)

    def _head(self, x: ir.Value, input_ids: ir.Value, head: Any) -> None:
        """Add the logits: the product of x [B, S, H] with the head."""
        vocab_size = self.architecture.vocab_size
        x = self._node("Reshape", [x, self._ints(-1, self.architecture.hidden_size)])
        x = self._last_valid(x, input_ids)
        # Gemm reads the embedding as it is; MatMul would want a transposed copy
        is_packed = self.bits.head < 16
        product = self._multiply(x, head) if is_packed else self._node("Gemm", [x, head], transB=1)
        logits = self._node("Reshape", [product, self._ints(-1, 1, vocab_size)])
        if self.element != ir.DataType.FLOAT:
            logits = self._cast(logits, ir.DataType.FLOAT)
        self._output(logits, "logits", ["batch_size", 1, vocab_size], ir.DataType.FLOAT)
