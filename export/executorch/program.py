"""Turn a checkpoint into an ExecuTorch program: shape and formats, the decoder, its lowering, verification.

Export, partition and serialise a StaticDecoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

from ...runtime.engines.engine import EngineOptions
from ...runtime.engines.executorch import ExecuTorchEngine
from ...runtime.engines.scheduler import EngineScheduler
from ...train.model.architecture import Architecture
from ..calibration import input_grams
from ..checkpoint import Checkpoint
from ..manifest import Contents, copy_tokenizer
from ..padding import pad_rows, padding_notes
from ..parity import check_written
from ..request import ExportRequest
from ..verification import StoredWeights, Written, run_chunks, step_through, torch_sample
from .options import ExecutorchOptions
from .quantize import ALIGNMENT, given_weights, quantize_decoder, weight_format
from .reader import read_weights
from .static_decoder import StaticDecoder


@dataclass(frozen=True)
class LoweredProgram:
    """A serialised program and its contents."""

    buffer: bytes
    delegates: int
    operators: tuple[str, ...]
    """Operators outside the delegates, which a runtime must register."""

    def describe(self) -> str:
        return f"{self.delegates} delegated parts; outside them {', '.join(self.operators) or 'nothing'}"


def lower(
    model: StaticDecoder, partitioners: list[Any], constants: dict[str, Any], begin: Callable[[str], None]
) -> LoweredProgram:
    """Export forward(tokens [1, S], input_pos [1]), lower it and serialise it. `begin` is told the stages."""
    with torch.no_grad():
        begin("tracing")
        # torch.export makes an axis of length 1 a constant
        inputs = {"tokens": torch.zeros(1, 3, dtype=torch.int64), "input_pos": torch.zeros(1, dtype=torch.int64)}
        shapes = {"tokens": {1: torch.export.Dim("tokens", min=1, max=model.context - 1)}, "input_pos": None}
        exported = torch.export.export(model, (), kwargs=inputs, dynamic_shapes=shapes, strict=False)
        begin("lowering")
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=partitioners,
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=constants,
        )
        begin("serialising")
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                extract_delegate_segments=True,
                do_quant_fusion_and_const_prop=True,
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),  # the caller has the inputs
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            )
        )
        buffer = program.buffer
    plan = program.executorch_program.execution_plan[0]
    operators = sorted({f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators})
    return LoweredProgram(buffer, len(plan.delegates), tuple(operators))


MODEL_FILE = "model.pte"


def write_program(checkpoint: Checkpoint, request: ExportRequest[ExecutorchOptions], folder: Path) -> Contents:
    """Write FOLDER/model.pte and the tokenizer's files, for this target and others that ship the program."""
    options, original = request.options, checkpoint.architecture
    weights = weight_format(options)
    context = min(options.max_context, checkpoint.context_length)
    needs_padding = "int4" in (weights.linear, weights.head, weights.embedding) and options.pad == "auto"
    padded = pad_rows(original, ALIGNMENT) if needs_padding else original
    for note in padding_notes(original, padded):
        request.say(note)
    program, stored = _build(checkpoint, request, padded, context)
    (folder / MODEL_FILE).write_bytes(program)
    files = [MODEL_FILE, *copy_tokenizer(checkpoint, folder)]  # our engine reads the tokenizer's, too
    verification = _verify(checkpoint, request, folder, context, stored) if options.verify else {}
    return Contents(
        engine="executorch",
        files=files,
        quantization=options.weight_type,
        weight_bytes=len(program),
        layout=f"executorch, xnnpack, context {context}",
        verification=verification,
    )


def _build(
    checkpoint: Checkpoint, request: ExportRequest[ExecutorchOptions], padded: Architecture, context: int
) -> tuple[bytes, StoredWeights]:
    """Return the serialised program and its weights, and report the contents.

    `padded` is the shape in the program, and `context` the slots of its caches.
    """
    options = request.options
    weights = weight_format(options)
    request.clock.begin("building")
    model: Any = StaticDecoder(checkpoint, padded, context, custom_ops=options.custom_ops, dtype=weights.dtype)
    grams = _grams(checkpoint, options.calibrate) if weights.linear == "int4" else None
    for note in quantize_decoder(model, weights, options, grams):
        request.say(note)
    stored = given_weights(model, weights)
    # one greedy partitioner makes 123 delegates of 30 layers instead of 304
    partitioners = [XnnpackPartitioner()]
    constants = _constant_methods(checkpoint, context, options.custom_ops)
    lowered = lower(model, partitioners, constants, request.clock.begin)
    request.say(f"xnnpack: {lowered.describe()}")
    return lowered.buffer, stored


def _grams(checkpoint: Checkpoint, text_path: str) -> dict[str, np.ndarray] | None:
    """Return the second moments of every matrix's inputs on the calibration text, by StaticDecoder's module names."""
    if not text_path:
        return None
    grams = input_grams(checkpoint, text_path)
    return {name.removeprefix("model.").removesuffix(".weight"): gram for name, gram in grams.items()}


def _constant_methods(checkpoint: Checkpoint, context: int, custom_ops: bool) -> dict[str, Any]:
    """Return the constant methods that ExecuTorch's TextLLMRunner reads."""
    bos = checkpoint.bos_id
    return {
        "get_max_seq_len": context,
        "get_max_context_len": context,
        "get_vocab_size": checkpoint.architecture.vocab_size,
        "get_n_layers": len(checkpoint.architecture.layers),
        "get_bos_id": bos if bos is not None else 0,
        "get_eos_ids": checkpoint.end_of_generation_ids or [0],
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": custom_ops,
        "enable_dynamic_shape": True,
    }


def _verify(
    checkpoint: Checkpoint, request: ExportRequest[ExecutorchOptions], folder: Path, context: int, stored: StoredWeights
) -> dict[str, dict[str, object]]:
    """Compare the written file in our engine with torch, on the source's weights (f32) or on the program's own."""
    request.clock.begin("verifying")
    name = request.options.weight_type
    sample = torch_sample(checkpoint, context)

    def load() -> EngineScheduler:
        return EngineScheduler(ExecuTorchEngine(folder / MODEL_FILE, EngineOptions()))

    runs = [step_through(load(), sample.tokens), run_chunks(load(), sample.tokens)]
    own = None if name == "f32" else read_weights(folder / MODEL_FILE, stored)
    return check_written(checkpoint, request, Written("executorch", "program", name), sample, runs, own)
