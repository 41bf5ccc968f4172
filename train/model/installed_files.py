"""Files that installed Python packages bring: the built-in model and text."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...runtime.base.errors import MissingExtraError, ModelError


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
