"""Intel CPUs, GPUs and NPUs, with fixed shapes and one token per call."""

from __future__ import annotations

from typing import Any

from ....runtime.base.errors import UsageError
from . import Recipe


def partitioners() -> list[Any]:
    try:
        from executorch.backends.openvino.partitioner import OpenvinoPartitioner
        from executorch.exir.backend.backend_details import CompileSpec
    except ModuleNotFoundError as error:
        raise UsageError("--recipe openvino needs openvino and nncf; run: pip install openvino nncf") from error
    return [OpenvinoPartitioner([CompileSpec("device", b"CPU")])]


RECIPE = Recipe("openvino", partitioners, formats=("f32",), custom_ops=False, static_length=True, runs_here=False)
