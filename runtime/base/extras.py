"""Optional dependencies: importing them, and saying which extra of the package brings what is missing.

Names of a package that are imported on first use, so that importing it costs nothing and needs no extra.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .errors import MissingExtraError


@contextlib.contextmanager
def extra(name: str, package: str = "") -> Iterator[None]:
    """Around imports of what `pip install 'efficientllm[name]'` brings: MissingExtraError where it is not installed.

    `package` is what the message calls it; without it, the module that was not found.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("efficientllm"):  # a fault of ours, which no extra mends
            raise
        raise MissingExtraError(package or error.name or name, name) from error


def lazy_names(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of `package` for `names`, {name: "module:attribute" relative to it}."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = names[name].partition(":")
        return getattr(importlib.import_module(module, package), attribute)

    return get
