"""`--target onnx --portable`: standard ONNX operators only, traced by torch.onnx.

It runs wherever opset 23 does, without onnxruntime's fused operators. It is slower there, and fp32 only. It shares no
code with graph.py, so that each checks the other.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from ...runtime.base.files import require_room
from ..checkpoint import Checkpoint
from ..exporter_config import OnnxDecoderConfig
from .portable_decoder import PortableDecoder

OPSET = 23
"""The first opset with Attention, RotaryEmbedding and RMSNormalization."""


def write_portable(checkpoint: Checkpoint, path: Path, has_all_logits: bool) -> None:
    """Write `path` and its external data, `path` + "_data"."""
    model = PortableDecoder(checkpoint, has_all_logits)
    config = OnnxDecoderConfig(checkpoint.config)
    inputs = config.generate_dummy_inputs(framework="pt")
    dims = {title: torch.export.Dim(title, min=1) for title in ("batch_size", "sequence", "past")}
    shapes = [{axis: _dim(title, dims) for axis, title in axes.items()} for axes in config.inputs.values()]
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                model,
                tuple(inputs.values()),
                input_names=list(config.inputs),
                output_names=list(config.outputs),
                dynamic_shapes=(*shapes[:2], *([tuple(shapes[2:])] if shapes[2:] else [])),  # of *past: one, or none
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            mask = program.model.graph.inputs[1]  # its length is a symbol that torch made up
            mask.shape = ir.Shape(list(config.inputs[mask.name].values()))
            _drop_metadata(program.model)
            require_room(path, 4 * checkpoint.architecture.num_parameters)
            ir.save(program.model, path, external_data=f"{path.name}_data")
    finally:
        logger.setLevel(level)


def _drop_metadata(model: ir.Model) -> None:
    """Remove the stack traces that torch notes at every node, because they name folders of this machine."""
    for item in (model, model.graph, *model.graph, *(value for node in model.graph for value in node.outputs)):
        item.metadata_props.clear()


def _dim(title: str, dims: Mapping[str, object]) -> object:
    """Return the symbol of a dynamic axis. The mask's length is a sum that torch derives itself."""
    return dims.get(title, torch.export.Dim.AUTO)
