"""Export, partition and serialise a StaticDecoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

from ..exporter_config import ExecutorchDecoderConfig
from .static_decoder import StaticDecoder

Stage = Callable[[str], contextlib.AbstractContextManager[None]]


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
    model: StaticDecoder,
    config: ExecutorchDecoderConfig,
    partitioners: list[Any],
    constants: dict[str, Any],
    stage: Stage,
) -> LoweredProgram:
    """Export `model` with the dynamic axes of `config` (or one token), lower it and serialise it.

    `stage(title)` is a context manager around each step.
    """
    with torch.no_grad():
        with stage("tracing"):
            length = 1 if model.static_length else 3
            inputs = config.generate_dummy_inputs(framework="pt", batch_size=1, sequence_length=length)
            exported = torch.export.export(
                model, (), kwargs=inputs, dynamic_shapes=_dynamic_shapes(model, config), strict=False
            )
        with stage("partitioning and lowering"):
            edge = to_edge_transform_and_lower(
                exported,
                partitioner=partitioners,
                compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
                constant_methods=constants,
            )
        with stage("serialising"):
            program = edge.to_executorch(
                ExecutorchBackendConfig(
                    extract_delegate_segments=True,
                    do_quant_fusion_and_const_prop=True,
                    memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                    sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
                )
            )
            buffer = program.buffer
    plan = program.executorch_program.execution_plan[0]
    operators = sorted({f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators})
    return LoweredProgram(buffer, len(plan.delegates), tuple(operators))


def _dynamic_shapes(model: StaticDecoder, config: ExecutorchDecoderConfig) -> Any:
    if model.static_length:
        return None
    bounds = {"min": 1, "max": model.context - 1}
    return {
        name: {axis: torch.export.Dim(title, **bounds) for axis, title in axes.items()} or None
        for name, axes in config.inputs.items()
    }
