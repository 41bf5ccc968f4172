"""The inference engines by name, and how an artefact is loaded into its own."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from ..base import flags
from ..base.errors import ArtefactError, EfficientLLMError, UsageError
from .artefact import Artefact
from .memory import give_back_freed_memory
from .owned import OwnedEngine
from .probe import probe_once
from .protocol import Engine

ENTRY_POINT_GROUP = "efficientllm.engines"

ENGINES = {
    "llama.cpp": "efficientllm.runtime.engines.llama_cpp:LlamaCppEngine",
    "onnxruntime": "efficientllm.runtime.engines.onnx:OnnxEngine",
    "onnxruntime-genai": "efficientllm.runtime.engines.genai:GenaiEngine",
    "executorch": "efficientllm.runtime.engines.executorch:ExecuTorchEngine",
}
"""Engine name -> "module:class"; plug-ins join through entry points."""

OTHERS = {
    "transformers": "AutoModelForCausalLM.from_pretrained reads it, and efficientllm-eval",
    "wllama": "it is a page for browsers: efficientllm-serve-web shows it",
    "litert-lm": "litert-lm run reads its .litertlm file",
}
"""What artefacts are for that no engine of ours runs."""

CacheChoice = Literal["auto", "f16", "q8_0", "f32"]
"""What keys and values are stored as."""

CACHE_CHOICES: dict[str, CacheChoice] = {name: name for name in get_args(CacheChoice)}
"""Each by its name."""

DEFAULT_CONTEXT = 4096
"""Largest context window allocated unless more is asked for."""


@dataclass(frozen=True)
class EngineOptions:
    """loading"""

    threads: int = flags.number(0, at_least=0)
    """CPU threads; 0: all cores."""
    context: int = flags.number(0, at_least=0)
    """Context window in tokens; 0: the model's own, at most 4096."""
    memory_map: bool = False
    """gguf: map the weights instead of reading them, for devices whose memory they hardly fit; they decode slower."""
    huge_pages: bool = True
    """Linux: move what was read into huge pages, for faster decoding; loading takes up to a second longer, and malloc
    keeps blocks of up to 32 MB in its heap from then on."""
    kv_cache: CacheChoice = "auto"
    """gguf: what keys and values are stored as; auto: what is fastest, as is the attention kernel, by a measurement of
    some seconds when a model is first loaded on a machine."""
    parallel: int = flags.number(0, at_least=0, at_most=64)
    """Chats whose caches stand side by side, and that a server answers together; 0: one, but 16 for a server."""
    cache_memory: int = flags.byte_count(0, at_least=0)
    """gguf: room for the caches of all chats, such as 500MB; 0: two context windows, or one for a single chat."""
    warm_up: bool = False
    """Evaluate one token after loading, so that the first answer does not wait for pages and buffers."""

    def __post_init__(self) -> None:
        flags.check_fields(self)

    @property
    def sequences(self) -> int:
        """Caches side by side."""
        return self.parallel or 1


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


def load_engine(
    model: str | Path | Artefact, options: EngineOptions | None = None, *, probe: bool = True
) -> OwnedEngine:
    """Load an artefact, or what lies at a path, in the engine its manifest names (or that its file type implies).

    Files that a manifest knows are compared with its hashes; without one, a child process loads them first, because
    what is damaged can end a process (not with `probe=False`, for processes that may end). Both are remembered.
    Raises ArtefactError for a missing, damaged or foreign artefact, MissingExtraError for a missing engine package.
    On Linux it moves the weights into huge pages and lets malloc keep larger blocks in its heap from then on, in the
    whole process (see `huge_pages`); EngineOptions(huge_pages=False) leaves both out.
    """
    artefact = model if isinstance(model, Artefact) else Artefact.open(model)
    engine_class = find_engine(artefact)
    options = options or EngineOptions()
    if options.kv_cache != "auto" and artefact.engine != "llama.cpp":
        raise UsageError(f"--kv-cache {options.kv_cache}: the type of the cache is part of {artefact.path.name} itself")
    artefact.verify()
    if probe and artefact.witness is None:
        probe_once(artefact, engine_version(artefact.engine), asdict(options))
    try:
        engine = OwnedEngine(
            engine_class(artefact.model_file, options), artefact.witness.sampling if artefact.witness else {}
        )
    except (EfficientLLMError, OSError):
        raise
    except Exception as error:  # whatever a library makes of a file that it does not expect
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ArtefactError(f"{artefact.path}: {artefact.engine} cannot load it: {reason}") from error
    if options.warm_up:
        engine.prefill([0])
    give_back_freed_memory()
    return engine


def check_engine(artefact: Artefact) -> dict[str, str]:
    """Where all engines are, by name; ArtefactError where none of them runs `artefact`."""
    plugins = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    known = ENGINES | {plugin.name: plugin.value for plugin in plugins}
    if artefact.engine not in known:
        others = OTHERS.get(artefact.engine, f"known: {', '.join(known)}")
        raise ArtefactError(f"{artefact.path} needs engine {artefact.engine!r}; {others}")
    return known


def find_engine(artefact: Artefact) -> Callable[[Path, EngineOptions], Engine]:
    """The class of engines that runs `artefact`; ArtefactError where neither we nor a plug-in has it."""
    known = check_engine(artefact)
    module, _, attribute = known[artefact.engine].partition(":")
    return getattr(importlib.import_module(module), attribute)
