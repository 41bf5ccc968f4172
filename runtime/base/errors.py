"""The one exception tree of efficientllm."""

from __future__ import annotations


class EfficientLLMError(Exception):
    """Base of every error a user can cause; commands print it as one line and exit with code 2.

    EfficientLLMError
    ├── UsageError            a flag, path or value that cannot be used as given
    │   ├── OptionError       an option's value that is of the wrong type or breaks its rule
    │   └── MissingExtraError an optional dependency is not installed
    ├── ModelError            a source model or checkpoint that is unsupported or damaged
    ├── DataError             a corpus that is missing, empty, too short or malformed
    ├── ArtefactError         an exported file that is missing, foreign, truncated or fails verification
    ├── DiskFullError         a disk that does not hold what is to be written
    ├── DeviceError           a device that cannot be reached, refuses, or lacks what a measurement needs
    ├── ContextOverflowError  a prompt that does not fit the context window
    └── TrainingDivergedError the loss stayed non-finite
    """


class UsageError(EfficientLLMError):
    """A flag, path or value that cannot be used as given."""


class UnanswerableError(UsageError):
    """A question whose own conditions, a grammar or forbidden tokens, leave no answer."""


class OptionError(UsageError, ValueError):
    """An option's value that is of the wrong type or breaks its rule."""


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed; run: pip install 'efficientllm[{extra}]'")


class ModelError(EfficientLLMError):
    """A source model or checkpoint that is unsupported or damaged."""


class DataError(EfficientLLMError):
    """A corpus that is missing, empty, too short or malformed."""


class ArtefactError(EfficientLLMError):
    """An exported file that is missing, foreign, truncated or fails verification."""


class DiskFullError(EfficientLLMError):
    """A disk that does not hold what is to be written."""

    def __init__(self, path: object, reason: str, remedy: str = "make room") -> None:
        super().__init__(f"{path} cannot be written: the disk is full ({reason}); {remedy}")
        self.path, self.reason = path, reason


class DeviceError(EfficientLLMError):
    """A device that cannot be reached, refuses, or lacks what a measurement needs."""


class ContextOverflowError(EfficientLLMError):
    """A prompt that does not fit the context window."""


class TrainingDivergedError(EfficientLLMError):
    """The loss or the gradients stayed non-finite."""
