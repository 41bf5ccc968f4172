"""Turn an ONNX file of ours into the decoder with states that OpenVINO GenAI runs.

OpenVINO keeps the 4-bit and 8-bit matrices of the file packed. Its own form of GroupQueryAttention cannot be saved and
takes one prompt at a time, so the attention of every layer is written anew. Its caches become states, whose rows
`beam_idx` selects, and prompts of a batch may be padded on either side. B batch, S new tokens, T = S + past tokens, H
query heads, G key/value heads, D head_dim, V vocabulary. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset15 as ops

MASKED = -65504.0
"""Score of a hidden token: finite in every type, because padding sees hidden tokens only."""


def stateful_decoder(path: Path) -> Any:
    """Return the OpenVINO model of the ONNX file at `path`, which has the logits of all tokens.

    Inputs are input_ids [B, S], attention_mask [B, T], beam_idx [B] and, in models that paged attention computes
    rightly, position_ids [B, S]. Output is logits [B, S, V].
    """
    model: Any = openvino.Core().read_model(path)
    attentions = [node for node in model.get_ordered_ops() if node.get_type_name() == "GroupQueryAttention"]
    shared = _SharedValues(model, _can_be_paged([node.get_attributes() for node in attentions]))
    for result in model.get_results():
        if "logits" in result.input_value(0).get_names():
            _multiply_last(result)
        else:
            model.remove_result(result)
    model.add_sinks([sink for node in attentions for sink in _replace_attention(node, shared)])
    for value in [value for node in attentions for value in node.input_values()[3:5]]:
        model.remove_parameter(value.get_node())
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            _pad_input(node)
    model.validate_nodes_and_infer_types()
    return model


def _can_be_paged(attentions: list[dict[str, Any]]) -> bool:
    """Tell whether OpenVINO's paged attention computes these layers."""
    # it ignores windows, and with layers of different query heads per key/value head it overwrites memory (2026.4.1)
    ratios = {each["num_heads"] // each["kv_num_heads"] for each in attentions}
    return len(ratios) == 1 and all(each["local_window_size"] <= 0 for each in attentions)


class _SharedValues:
    """Values that all layers read."""

    def __init__(self, model: Any, has_positions: bool) -> None:
        """Add the inputs. OpenVINO GenAI pages the caches of models with position_ids, and no others."""
        ids, mask = (model.input(name).get_node() for name in ("input_ids", "attention_mask"))
        self.beams = _input(model, "beam_idx", [-1], np.int32)
        self.batch, self.total = _size(ids, 0), _size(mask, 1)
        start = self.total - _size(ids, 1)
        if has_positions:
            self.positions = _input(model, "position_ids", [-1, -1], np.int64)
        else:
            counted = ops.relu(ops.cumsum(mask, 1) - 1)
            self.positions = ops.slice(counted, start, self.total, [1], [1])
        begin, end = (ops.squeeze(each, 0) for each in (start, self.total))
        self.keys = ops.range(0, end, 1, "i64")
        self.queries = ops.unsqueeze(ops.range(begin, end, 1, "i64"), [1])
        is_valid = ops.unsqueeze(ops.convert(mask, "boolean"), [1, 2])
        self.visible = ops.logical_and(ops.less_equal(self.keys, self.queries), is_valid)
        self.masks: dict[int, Any] = {}
        self.tables: dict[str, Any] = {}

    def mask(self, window: int) -> Any:
        """Return what is added to scores, [B, 1, S, T]. A window of 0 or less is none."""
        if window not in self.masks:
            visible = self.visible
            if window > 0:
                visible = ops.logical_and(visible, ops.greater(self.keys, self.queries - window))
            self.masks[window] = ops.select(visible, _float(0.0), _float(MASKED))
        return self.masks[window]

    def at_positions(self, table: Any) -> Any:
        """Return the rows [B, 1, S, D / 2] of a rotary table."""
        name = table.get_node().get_friendly_name()
        if name not in self.tables:
            self.tables[name] = ops.unsqueeze(ops.gather(table, self.positions, 0), [1])
        return self.tables[name]


def _replace_attention(node: Any, shared: _SharedValues) -> list[Any]:
    """Replace a GroupQueryAttention and return the nodes that store its new states."""
    # OpenVINO's fusions of the rotary embedding, the states and the heads recognise these very operators
    attributes, (query, key, value, *pasts) = node.get_attributes(), node.input_values()[:5]
    heads, groups = attributes["num_heads"], attributes["kv_num_heads"]
    head_dim = pasts[0].get_partial_shape()[3].get_length()
    if attributes["do_rotary"]:
        cos, sin = (shared.at_positions(table) for table in node.input_values()[7:9])
        query, key = (_rotated(each, cos, sin) for each in (query, key))
    stores, wholes = [], []
    for new, past in zip((key, value), pasts, strict=True):
        state = _state(past.get_node().get_friendly_name(), [-1, groups, -1, head_dim])
        empty = ops.broadcast(_float(0.0), ops.concat([shared.batch, [groups, 0, head_dim]], 0))
        # the rows of the last call in the order of this one, as GenAI's beam search asks for
        earlier = ops.gather(ops.read_value(empty, state), shared.beams, 0)
        whole = ops.concat([earlier, new], 2)
        stores.append(ops.assign(whole, state))
        if groups < heads:
            shape = ops.concat([shared.batch, [groups, heads // groups], shared.total, [head_dim]], 0)
            repeated = ops.broadcast(ops.unsqueeze(whole, [2]), shape, broadcast_spec="BIDIRECTIONAL")
            whole = ops.reshape(repeated, [0, heads, -1, head_dim], True)
        wholes.append(whole)
    mask, scale = shared.mask(attributes["local_window_size"]), _float(attributes["scale"])
    attended = ops.transpose(ops.scaled_dot_product_attention(query, *wholes, mask, scale), [0, 2, 1, 3])
    joined = ops.reshape(attended, [0, 0, heads * head_dim], True)
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(joined.output(0))
    return stores


def _rotated(x: Any, cos: Any, sin: Any) -> Any:
    """Return x [B, heads, S, D] with its rotary embedding."""
    half = cos.get_output_partial_shape(0)[3].get_length()
    first, second = ops.variadic_split(x, -1, [half, half]).outputs()
    turned = ops.multiply(first, cos) + ops.multiply(ops.multiply(second, sin), _float(-1.0))
    return ops.concat([turned, ops.multiply(second, cos) + ops.multiply(first, sin)], -1)


def _multiply_last(result: Any) -> None:
    """Let the logits be a product, [B, S, V]."""
    # OpenVINO GenAI then finds it and computes those that it needs
    product = result.input_value(0).get_node()
    while product.get_type_name() != "MatMul":  # a Reshape, and what Gemm adds
        product = product.input_value(0).get_node()
    rows, head = product.input_value(0).get_node(), product.input_value(1)
    logits = ops.matmul(rows.input_value(0), head, False, product.get_attributes()["transpose_b"])
    logits.output(0).set_names({"logits"})
    result.input(0).replace_source_output(logits.output(0))


def _pad_input(product: Any) -> None:
    """Fill up the inputs of a product whose matrix ends within a block."""
    # OpenVINO would unpack a cut matrix
    cut = product.input_value(1).get_node()
    if cut.get_type_name() == "Slice":
        whole, columns = cut.input_value(0), cut.get_output_partial_shape(0)[1].get_length()
        missing = whole.get_partial_shape()[1].get_length() - columns
        padded = ops.pad(product.input_value(0), [0, 0, 0], [0, 0, missing], "constant", _float(0.0))
        product.input(0).replace_source_output(padded.output(0))
        product.input(1).replace_source_output(whole)


def _input(model: Any, name: str, shape: list[int], dtype: type) -> Any:
    parameter = ops.parameter(shape, dtype, name=name)
    parameter.output(0).set_names({name})
    model.add_parameters([parameter])
    return parameter


def _state(name: str, shape: list[int]) -> Any:
    info = openvino.op.util.VariableInfo()
    info.variable_id, info.data_type, info.data_shape = name, openvino.Type.f32, openvino.PartialShape(shape)
    return openvino.op.util.Variable(info)


def _size(x: Any, axis: int) -> Any:
    """Return the size of an axis, [1]."""
    return ops.gather(ops.shape_of(x, "i64"), [axis], 0)


def _float(value: float) -> Any:
    return ops.constant(np.float32(value))
