"""Importing ExecuTorch's Python packages in the one order that works."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator

from ..base.command import LOGGER
from ..base.extras import extra

_IN_ORDER = (
    "executorch.extension.pybindings.portable_lib",
    "executorch.runtime",
    "executorch.extension.llm.custom_ops.custom_ops",  # llama::update_cache, llama::custom_sdpa
    "executorch.kernels.quantized",  # quantized_decomposed::embedding_*; before the others, XNNPACK fails to initialise
)


def import_executorch() -> None:
    """Register ExecuTorch's operators, for export and for running; MissingExtraError where it is not installed."""
    with extra("executorch"), quiet_executorch():
        for name in _IN_ORDER:
            importlib.import_module(name)


@contextlib.contextmanager
def quiet_executorch() -> Iterator[None]:
    """Without the warnings and progress messages of ExecuTorch's Python code; errors are shown."""
    ours = logging.getLogger(LOGGER)
    wanted = {ours: ours.getEffectiveLevel()}  # else it would be the root's
    wanted |= {logging.getLogger(name): logging.ERROR for name in (None, "executorch", "torch", "torchao")}
    levels = {logger: logger.level for logger in wanted}
    for logger, level in wanted.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
