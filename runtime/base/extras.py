"""Import optional dependencies, and the names of our packages, on first use."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .errors import MissingExtraError

NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""Loggers that warn while transformers imports torchao: of CUDA libraries on CPUs, and of old calls."""


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Silence NOISY_LOGGERS in this block, unless the program has given them a level."""
    loggers = [logger for logger in map(logging.getLogger, NOISY_LOGGERS) if logger.level == logging.NOTSET]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger in loggers:
            logger.setLevel(logging.NOTSET)


@contextlib.contextmanager
def extra(name: str, package: str = "") -> Iterator[None]:
    """Turn a failed import in the block into a MissingExtraError that names the extra.

    The message names `package`, by default the module that was not found.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("efficientllm"):  # a fault of ours that no extra fixes
            raise
        raise MissingExtraError(package or error.name or name, name) from error


PACKAGES = {"llama_cpp": "llama-cpp-python"}
"""Module -> its distribution, if the names differ."""


def require_extra(name: str, *modules: str) -> None:
    """Raise MissingExtraError if one of the top-level `modules` of extra `name` is not installed. Import nothing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(PACKAGES.get(module, module), name)


def lazy_names(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for `package` that imports `names`, {name: "module:attribute" relative to it}."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = names[name].partition(":")
        with without_noise():
            return getattr(importlib.import_module(module, package), attribute)

    return get
