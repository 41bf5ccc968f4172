"""`--target executorch`: a .pte for ExecuTorch's own LLM runner, verified. Imports no torch until it runs."""

from __future__ import annotations

from pathlib import Path

from ...runtime.base.extras import extra, require_extra
from ...runtime.engines.executorch import import_executorch, quiet_executorch
from ...train.model.target_rules import check_target
from ..checkpoint import Checkpoint
from ..manifest import write_manifest
from ..request import ExportRequest
from ..targets import Exporter
from .options import ExecutorchOptions


def export_executorch(checkpoint: Checkpoint, request: ExportRequest[ExecutorchOptions], folder: Path) -> None:
    """Write the program, tokenizer files and manifest."""
    check_target("executorch", checkpoint.config, checkpoint.architecture)
    import_executorch()
    with quiet_executorch():
        with extra("executorch"):  # which brings torchao, too
            from .program import write_program
        contents = write_program(checkpoint, request, folder)
    write_manifest(checkpoint, request, folder, contents)


MODULES = ("executorch", "torchao")
"""Modules of the extra."""


def check_executorch(options: ExecutorchOptions) -> None:
    """Raise MissingExtraError without ExecuTorch."""
    require_extra("executorch", *MODULES)


EXPORTER = Exporter(ExecutorchOptions, export_executorch, check_executorch)
