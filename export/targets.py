"""The export targets: a table of names to "module:function", ours and those of installed plug-ins."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import Protocol

from ..runtime.base.errors import UsageError
from .checkpoint import Checkpoint
from .request import ExportRequest

ENTRY_POINT_GROUP = "efficientllm.exporters"


class Exporter(Protocol):
    """Writes a checkpoint as an artefact into an empty folder."""

    def __call__(self, checkpoint: Checkpoint, request: ExportRequest, folder: Path) -> None:
        """Raise an EfficientLLMError where the export fails or does not verify; the folder is then discarded."""
        ...


EXPORTERS = {
    "gguf": "efficientllm.export.gguf.exporter:export_gguf",
    "onnx": "efficientllm.export.onnx.exporter:export_onnx",
    "executorch": "efficientllm.export.executorch.exporter:export_executorch",
    "hf-uniform": "efficientllm.export.hf_uniform:export_hf_uniform",
}


def known_targets() -> dict[str, str]:
    plugins = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return EXPORTERS | {plugin.name: plugin.value for plugin in plugins}


def load_exporter(target: str) -> Exporter:
    """The exporter of `target`; UsageError lists the known ones."""
    targets = known_targets()
    if target not in targets:
        raise UsageError(f"--target {target}: unknown; known: {', '.join(targets)}")
    module, _, function = targets[target].partition(":")
    exporter: Exporter = getattr(importlib.import_module(module), function)
    return exporter
