"""One interface over the inference engines, and how an artefact is loaded into its own."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..base import flags
from ..base.errors import ArtefactError
from .artefact import Artefact
from .memory import give_back_freed_memory

ENTRY_POINT_GROUP = "efficientllm.engines"

ENGINES = {
    "llama.cpp": "efficientllm.runtime.engines.llama_cpp:LlamaCppEngine",
    "onnxruntime": "efficientllm.runtime.engines.onnx:OnnxEngine",
    "onnxruntime-genai": "efficientllm.runtime.engines.genai:GenaiEngine",
    "executorch": "efficientllm.runtime.engines.executorch:ExecuTorchEngine",
}
"""Engine name -> "module:class"; plug-ins join through entry points."""

DEFAULT_CONTEXT = 4096
"""Largest context window allocated unless more is asked for."""


@dataclass(frozen=True)
class EngineOptions:
    """loading"""

    threads: int = 0
    """CPU threads; 0: all cores."""
    context: int = 0
    """Context window in tokens; 0: the model's own, at most 4096."""
    memory_map: bool = False
    """gguf: map the weights instead of reading them, for devices whose memory they hardly fit; they decode slower."""
    huge_pages: bool = True
    """Linux: move what was read into huge pages, for faster decoding; loading takes up to a second longer, and malloc
    keeps blocks of up to 32 MB in its heap from then on."""
    warm_up: bool = False
    """Evaluate one token after loading, so that the first answer does not wait for pages and buffers."""

    def __post_init__(self) -> None:
        flags.check_types(self)
        for name in ("threads", "context"):
            flags.require(self, name, getattr(self, name) >= 0, "must not be negative")


class Engine(Protocol):
    """A loaded model that evaluates tokens one sequence at a time. V is the vocabulary size."""

    context_length: int
    """Tokens that fit, prompt and answer together."""
    vocab_size: int
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    chat_template: str | None
    """Jinja template of the tokenizer, where it has one."""
    bos_token: str
    eos_token: str
    adds_bos: bool
    """Whether plain text is preceded by the BOS token."""
    load_ms: float
    kv_cache_bytes: int
    """Key/value caches at full context; 0 where the file does not tell."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        """Load `path`; ArtefactError where it is not a model of this engine."""
        ...

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids; `special` turns text such as <|im_end|> into its control token."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes (possibly part of a character) of a token; b"" for control tokens."""
        ...

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Make `tokens` the evaluated sequence and return the last one's logits, fp32 [V].

        What the cache already holds of them is reused; ContextOverflowError where they do not fit.
        """
        ...

    def decode(self, token: int) -> np.ndarray:
        """Append one token and return its logits, fp32 [V]."""
        ...

    def evaluate(self, tokens: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """Make `tokens` the evaluated sequence; yields the logits of positions first, first + 1, ... as fp32 [n, V]."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


PACKAGES = {
    "llama.cpp": "llama-cpp-python",
    "onnxruntime": "onnxruntime",
    "onnxruntime-genai": "onnxruntime-genai",
    "executorch": "executorch",
}
"""Engine name -> the distribution that brings it."""


def engine_version(name: str) -> str:
    """ "PACKAGE VERSION" of the engine called `name`, "" where it is a plug-in's or not installed."""
    package = PACKAGES.get(name)
    try:
        return f"{package} {importlib.metadata.version(package)}" if package else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def load_engine(model: str | Path | Artefact, options: EngineOptions | None = None) -> Engine:
    """Load an artefact, or what lies at a path, in the engine its manifest names (or that its file type implies).

    Raises ArtefactError for a missing, truncated or foreign artefact, MissingExtraError for a missing engine package.
    On Linux it moves the weights into huge pages and lets malloc keep larger blocks in its heap from then on, in the
    whole process (see `huge_pages`); EngineOptions(huge_pages=False) leaves both out.
    """
    artefact = model if isinstance(model, Artefact) else Artefact.open(model)
    plugins = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    known = ENGINES | {plugin.name: plugin.value for plugin in plugins}
    if artefact.engine not in known:
        raise ArtefactError(f"{artefact.path} needs engine {artefact.engine!r}; known: {', '.join(known)}")
    module, _, attribute = known[artefact.engine].partition(":")
    engine_class: type[Engine] = getattr(importlib.import_module(module), attribute)
    options = options or EngineOptions()
    engine = engine_class(artefact.model_file, options)
    if options.warm_up:
        engine.prefill([0])
    give_back_freed_memory()
    return engine
