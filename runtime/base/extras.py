"""Optional dependencies: importing them, and saying which extra of the package brings what is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
