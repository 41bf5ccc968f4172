"""Exceptions of efficientllm."""

from __future__ import annotations

import json
import shlex


class EfficientLLMError(Exception):
    """Base of every error that a user can cause. Commands print it as one line and exit with code 2.

    EfficientLLMError
    ├── UsageError            a flag, path or value that cannot be used as given
    │   ├── UnanswerableError a grammar or forbidden tokens that exclude every output
    │   ├── OptionError       a value of an option that has the wrong type or is not allowed
    │   └── MissingExtraError an optional dependency is not installed
    ├── ModelError            a source model or checkpoint that is unsupported or damaged
    ├── DataError             a corpus that is missing, empty, too short or malformed
    ├── ArtefactError         an exported file that is missing, foreign, truncated or fails verification
    ├── DiskFullError         a disk without room for a file
    ├── DeviceError           a device that cannot be reached or cannot run a measurement
    ├── ContextOverflowError  a prompt that does not fit the context window
    └── TrainingDivergedError a loss or gradients that stayed non-finite
    """


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class UsageError(EfficientLLMError):
    """A flag, path or value that cannot be used as given."""


class UnanswerableError(UsageError):
    """A request whose grammar or forbidden tokens exclude every output."""


class OptionError(UsageError, ValueError):
    """A value of an option that has the wrong type or is not allowed."""


def install_command(extras: str) -> str:
    """Return the pip command that adds `extras`, from the folder of a clone if efficientllm was installed from one."""
    # here, because the package `runtime` imports this module, and they take half of the start of a command
    from importlib.metadata import distributions
    from urllib.parse import urlparse
    from urllib.request import url2pathname

    # a clone also has a folder .egg-info, which comes first where its root is on the path and does not tell the origin
    texts = (each.read_text("direct_url.json") for each in distributions(name="efficientllm"))
    origin = json.loads(next(filter(None, texts), "{}"))
    is_clone = "dir_info" in origin
    place = url2pathname(urlparse(origin["url"]).path) if is_clone else "efficientllm"
    editable = "-e " if is_clone and origin["dir_info"].get("editable") else ""
    return f"pip install {editable}{shlex.quote(f'{place}[{extras}]')}"


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str, command: str = "") -> None:
        """Name the `command` that installs `module`, by default pip's for the `extra`."""
        super().__init__(f"{module} is not installed; run: {command or install_command(extra)}")


class ModelError(EfficientLLMError):
    """A source model or checkpoint that is unsupported or damaged."""


class DataError(EfficientLLMError):
    """A corpus that is missing, empty, too short or malformed."""


class ArtefactError(EfficientLLMError):
    """An exported file that is missing, foreign, truncated or fails verification."""


class DiskFullError(EfficientLLMError):
    """A disk without room for a file."""

    def __init__(self, path: object, reason: str, remedy: str = "make room") -> None:
        super().__init__(f"{path} cannot be written: the disk is full ({reason}); {remedy}")
        self.path, self.reason = path, reason


class DeviceError(EfficientLLMError):
    """A device that cannot be reached or cannot run a measurement."""


class ContextOverflowError(EfficientLLMError):
    """A prompt that does not fit the context window."""

    def __init__(self, message: str, num_tokens: int = 0, context_length: int = 0) -> None:
        """Keep the tokens of the prompt and of the window, 0 if they are not told."""
        super().__init__(message)
        self.num_tokens, self.context_length = num_tokens, context_length


class TrainingDivergedError(EfficientLLMError):
    """A loss or gradients that stayed non-finite."""
