"""`--target onnx --portable`: a decoder in standard ONNX operators only (opset 23), traced by torch.onnx.

It runs wherever opset 23 does, without onnxruntime's fused operators. It is slower there, and fp32 only. It shares no
code with graph.py, so that each checks the other.

`forward(input_ids [B, S], attention_mask [B, T], *past) -> (logits fp32 [B, 1 or S, V], *present)`. past [B, G_i, P,
D] and present [B, G_i, T, D] are key and value of every layer with attention, T = P + S. Logits are those of the last
valid new token, or of all. Prompts of a batch may be padded on either side, with zeros in their mask. See
decoder_modules for the other letters.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from ...runtime.base.files import require_room
from ...train.model.architecture import Architecture, LayerShape
from ...train.model.attention import LayerAttention
from ..checkpoint import Checkpoint
from ..decoder_modules import Attention, Decoder

OPSET = 23
"""The first opset with Attention, RotaryEmbedding and RMSNormalization."""


@dataclass
class Caches:
    """Values that the layers of one call share."""

    rotary: Mapping[str, tuple[Tensor, Tensor]]
    """{rotary_key: cos and sin [C, rotary_dim / 2]}"""
    positions: Tensor
    """int64 [B, S]"""
    mask: Tensor
    """bool [B, 1, S, T]: the visible tokens of each new token."""
    distance: Tensor
    """int64 [B, 1, S, T]: positions of each token before each new one. Padding has none of its own."""
    past: Iterator[Tensor]
    present: list[Tensor] = field(default_factory=list)


class PortableAttention(Attention):
    """Attention with ONNX's own RotaryEmbedding and Attention."""

    def forward(self, x: Tensor, context: Caches) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in self.project(x))
        settings, mask = self.settings, context.mask
        if settings.rope is not None:
            cos, sin = context.rotary[settings.rotary_key]
            rotary_dim = settings.rotary_dim if settings.rotary_dim < self.head_dim else 0
            query, key = (
                torch.onnx.ops.rotary_embedding(part, cos, sin, context.positions, rotary_embedding_dim=rotary_dim)
                for part in (query, key)
            )
        if settings.window:
            mask = mask & (context.distance < settings.window)
        attended, present_key, present_value, _ = torch.onnx.ops.attention(
            query,
            key,
            value,
            mask,
            next(context.past),
            next(context.past),
            q_num_heads=self.heads,
            kv_num_heads=self.groups,
            scale=settings.scale,
        )
        context.present += [present_key, present_value]
        joined = attended.transpose(1, 2).reshape(*x.shape[:2], self.heads * self.head_dim)
        return self.o_proj(joined)


class PortableDecoder(Decoder):
    """Decoder with the interface of the module's docstring."""

    def __init__(self, checkpoint: Checkpoint, has_all_logits: bool) -> None:
        super().__init__(checkpoint, checkpoint.architecture)
        self.has_all_logits = has_all_logits
        self.store_rotary(self.rotary_tables(checkpoint, checkpoint.context_length))

    def attention(self, layer: LayerShape, settings: LayerAttention) -> PortableAttention:
        return PortableAttention(self.architecture, layer, settings, self.scales)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        length, total = input_ids.shape[1], attention_mask.shape[1]
        past_length = total - length
        # padding on the left would have the position -1, which the rotary tables lack
        all_positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        positions = all_positions[:, past_length:]
        steps = torch.arange(total)
        is_before = steps[None, :] <= steps[past_length:, None]
        mask = is_before[None, None] & attention_mask.bool()[:, None, None, :]
        distance = (positions[:, :, None] - all_positions[:, None, :]).unsqueeze(1)
        caches = Caches(self.stored_rotary(), positions, mask, distance, iter(past))
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, caches)
        if self.has_all_logits:
            return self.lm_head(self.norm(x)), *caches.present
        # the largest number among valid tokens is the last one's, on whichever side the padding is
        numbered = attention_mask[:, past_length:] * torch.arange(1, length + 1)
        last = numbered.argmax(1)  # [B], among the new tokens
        last_x = x[torch.arange(x.shape[0]), last].unsqueeze(1)
        return self.lm_head(self.norm(last_x)), *caches.present


def input_axes(architecture: Architecture) -> dict[str, dict[int, str]]:
    """Return {input: {dynamic axis: its name}}. Caches are those of layers with attention, [B, G, P, D]."""
    axes = {"input_ids": {0: "batch_size", 1: "sequence"}, "attention_mask": {0: "batch_size", 1: "total"}}
    for index, layer in enumerate(architecture.layers):
        for part in ("key", "value") if layer.num_key_value_heads else ():
            axes[f"past_key_values.{index}.{part}"] = {0: "batch_size", 2: "past"}
    return axes


def write_portable(checkpoint: Checkpoint, path: Path, has_all_logits: bool) -> None:
    """Write `path` and its external data, `path` + "_data"."""
    model = PortableDecoder(checkpoint, has_all_logits)
    architecture = checkpoint.architecture
    all_axes, (batch, length, past) = input_axes(architecture), (2, 3, 5)
    inputs = [torch.zeros(batch, length, dtype=torch.int64), torch.ones(batch, past + length, dtype=torch.int64)]
    for groups in (layer.num_key_value_heads for layer in architecture.layers if layer.num_key_value_heads):
        inputs += [torch.rand(batch, groups, past, architecture.head_dim) for _ in ("key", "value")]
    dims = {title: torch.export.Dim(title, min=1) for title in ("batch_size", "sequence", "past")}
    shapes = []
    for axes in all_axes.values():
        # the mask's length is a sum, which torch derives itself
        shapes.append({axis: dims.get(title, torch.export.Dim.AUTO) for axis, title in axes.items()})
    past_shapes = [tuple(shapes[2:])] if shapes[2:] else []  # *past is one argument, or none without attention
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                model,
                tuple(inputs),
                input_names=list(all_axes),
                output_names=["logits", *(name.replace("past_key_values", "present") for name in list(all_axes)[2:])],
                dynamic_shapes=(*shapes[:2], *past_shapes),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            mask = program.model.graph.inputs[1]  # its length is a symbol that torch made up
            mask.shape = ir.Shape(list(all_axes[mask.name].values()))
            _drop_metadata(program.model)
            require_room(path, 4 * architecture.num_parameters)
            ir.save(program.model, path, external_data=f"{path.name}_data")
    finally:
        logger.setLevel(level)


def _drop_metadata(model: ir.Model) -> None:
    """Remove the stack traces that torch notes at every node."""
    # they name folders of this machine
    values = [value for node in model.graph for value in node.outputs]
    for item in (model, model.graph, *model.graph, *values):
        item.metadata_props.clear()
