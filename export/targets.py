"""Export targets: a table of names to "module:exporter", extended by installed plug-ins."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from ..runtime.base import flags
from ..runtime.base.errors import UsageError
from ..runtime.base.quantities import unknown_name
from .checkpoint import Checkpoint
from .request import ExportRequest

ENTRY_POINT_GROUP = "efficientllm.exporters"

OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class Exporter(Generic[OptionsT]):
    """One target: its options and its writer."""

    options: type[OptionsT]
    """Frozen dataclass with a default for every field. Its fields are the target's flags."""
    write: Callable[[Checkpoint, ExportRequest[OptionsT], Path], None]
    """Write a checkpoint as an artefact into an empty folder. Raises an EfficientLLMError if the export fails or does
    not verify; the folder is then discarded."""
    check: Callable[[OptionsT], None] = lambda options: None
    """Raise UsageError for options and missing packages that can be found without importing a package."""


EXPORTERS = {
    "gguf": "efficientllm.export.gguf.exporter:EXPORTER",
    "onnx": "efficientllm.export.onnx.exporter:EXPORTER",
    "executorch": "efficientllm.export.executorch.exporter:EXPORTER",
    "hf-uniform": "efficientllm.export.hf:EXPORTER",
    "web": "efficientllm.export.web.exporter:EXPORTER",
    "android": "efficientllm.export.phone.exporter:ANDROID",
    "ios": "efficientllm.export.phone.exporter:IOS",
}


def known_targets() -> dict[str, str]:
    plugins = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return EXPORTERS | {plugin.name: plugin.value for plugin in plugins}


def load_exporter(target: str) -> Exporter[Any]:
    """Return the exporter of `target`. Raises UsageError with the known ones."""
    targets = known_targets()
    if target not in targets:
        raise unknown_name("--target", target, targets)
    try:
        return importlib.metadata.EntryPoint(target, targets[target], ENTRY_POINT_GROUP).load()
    except (ImportError, AttributeError) as error:
        if target in EXPORTERS:
            raise
        raise UsageError(f"--target {target}: its plug-in, {targets[target]}, cannot be loaded: {error}") from error


def option_names(target: str) -> set[str]:
    """Return the names of a target's options."""
    return {field.name for field in dataclasses.fields(load_exporter(target).options)}


def _reads(target: str, name: str) -> bool:
    """Tell whether a target has option `name`. A plug-in that cannot be loaded has none."""
    with contextlib.suppress(UsageError):
        return name in option_names(target)
    return False


def readers_of(name: str) -> list[str]:
    """Return the targets that have option `name`."""
    return [target for target in known_targets() if _reads(target, name)]


def refuse_option(target: str, name: str, flag: str = "") -> NoReturn:
    """Raise UsageError for option `name`, which `target` does not have, and name the targets that do.

    `flag` is the option as it was typed.
    """
    readers = readers_of(name)
    hint = f"{', '.join(readers)} {'do' if len(readers) > 1 else 'does'}" if readers else "no target does"
    raise UsageError(
        f"{flag or flags.flag_name(name)}: --target {target} does not read it, {hint} "
        f"(see efficientllm-export --target {target} --help)"
    )
