"""Apple's neural engine and GPU, with fixed shapes and one token per call.

The program is passed in fp32 and computes in fp16, CoreML's default. With an fp16 program, coremltools 9 refuses the
update of the caches.
"""

from __future__ import annotations

from typing import Any

from ....runtime.base.errors import UsageError
from . import Recipe


def partitioners() -> list[Any]:
    try:
        import coremltools
        from executorch.backends.apple.coreml.compiler import CoreMLBackend
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    except ModuleNotFoundError as error:
        raise UsageError("--recipe coreml needs coremltools; run: pip install coremltools") from error
    specs = CoreMLBackend.generate_compile_specs(minimum_deployment_target=coremltools.target.iOS18)
    return [CoreMLPartitioner(compile_specs=specs, take_over_mutable_buffer=True)]


RECIPE = Recipe("coreml", partitioners, formats=("f32",), custom_ops=False, static_length=True, runs_here=False)
