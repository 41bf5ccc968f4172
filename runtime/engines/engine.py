"""List the inference engines by name and load an artefact into its engine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, Literal

from ..base import flags
from ..base.errors import ArtefactError, EfficientLLMError, UsageError
from .artefact import Artefact
from .llama_library import llama_package, load_llama
from .memory import trim_heap
from .probe import probe_artefact
from .protocol import Engine
from .scheduler import EngineScheduler

ENTRY_POINT_GROUP = "efficientllm.engines"

ENGINES = {
    "llama.cpp": "efficientllm.runtime.engines.llama_cpp:LlamaCppEngine",
    "onnxruntime": "efficientllm.runtime.engines.onnx:OnnxEngine",
    "executorch": "efficientllm.runtime.engines.executorch:ExecuTorchEngine",
}
"""Engine name -> "module:class". Plug-ins add theirs by entry points."""

EXTERNAL_RUNTIMES = {
    "transformers": "load it with AutoModelForCausalLM.from_pretrained or efficientllm-eval",
    "wllama": "it is a page for browsers; show it with efficientllm-serve-web",
}
"""Engine of an artefact that we export but do not run -> how to use the artefact."""

CacheChoice = Literal["auto", "f16", "q8_0", "f32"]
"""Type of keys and values in the KV cache."""

DEFAULT_CONTEXT = 4096
"""Largest context window, in tokens, that is allocated by default."""


def context_length(wanted: int, trained: int) -> int:
    """Return the context window for `--context` and the `trained` one, 0 if that is unknown.

    Raise UsageError if `wanted` is longer, because a model is wrong at positions that it has not seen.
    """
    if trained and wanted > trained:
        raise UsageError(f"--context {wanted}: the model was trained on {trained} tokens; use at most {trained}")
    return wanted or min(DEFAULT_CONTEXT, trained or DEFAULT_CONTEXT)


MAX_THREADS = 512
"""GGML_MAX_N_THREADS of llama.cpp. More threads end the process."""


@dataclass(frozen=True)
class EngineOptions:
    """Loading."""

    threads: int = flags.number(0, at_least=0, at_most=MAX_THREADS)
    """CPU threads; 0: all cores. llama.cpp on Linux then leaves out those that other programs use."""
    context: int = flags.number(0, at_least=0)
    """Context window in tokens, at most the model's own; 0: the model's own, at most 4096."""
    memory_map: bool = False
    """gguf: map the weights from the file instead of reading them. This needs less memory and decodes more slowly."""
    huge_pages: bool = True
    """Linux: move the weights into huge pages, for faster decoding. Loading takes up to a second longer, and malloc
    keeps blocks of up to 32 MB in its heap from then on."""
    kv_cache: CacheChoice = "auto"
    """gguf: type of keys and values in the KV cache. auto: the fastest type and attention kernel, see --tune."""
    tune: bool = True
    """gguf: time attention kernels and passes when a model is new to a machine, usually in 1 to 8 seconds. The result
    is stored. --no-tune takes plain attention over an f16 cache, and so does a busy machine until a later load."""
    parallel: int = flags.number(0, at_least=0, at_most=64)
    """Number of chats with a KV cache, which a server answers together. 0: one, in a server 16."""
    cache_memory: int = flags.byte_count(0, at_least=0)
    """gguf: largest KV cache of all chats, such as 500MB. 0: two context windows, or one for a single chat."""
    lookup: bool = True
    """gguf: propose tokens that followed the last ones earlier in prompt or answer, and check several in one pass. The
    answer is as without it, but for the rounding of kernels for several tokens. Where this is measured to be slower,
    nothing is proposed."""
    warm_up: bool = False
    """Evaluate one token after loading, so that memory is allocated before the first answer."""

    def __post_init__(self) -> None:
        flags.check_fields(self)

    @property
    def sequences(self) -> int:
        """Return the number of sequences with a KV cache."""
        return self.parallel or 1


def engine_version(name: str) -> str:
    """Return "PACKAGE VERSION" of an engine, "" for a plug-in's or one that is not installed."""
    if name not in ENGINES:
        return ""
    package = llama_package() if name == "llama.cpp" else name
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _llama_cpp_build() -> str:
    llama = load_llama()
    parts = [llama.llama_print_system_info().decode().strip(" |")]
    # Only ggml itself reports both, since 2025. llama-cpp-python has no function for them.
    library = llama.llama_cpp._lib if llama_package() == "llama-cpp-python" else llama
    for name in ("version", "commit"):
        function = getattr(library, f"ggml_{name}", None)
        if function is not None:
            function.restype = ctypes.c_char_p
            parts.append(f"ggml {name} {function().decode()}")
    return " | ".join(parts)


def engine_build(name: str) -> str:
    """Return the commit and instruction sets of an installed engine, "" for plug-ins."""
    if name == "onnxruntime":
        import onnxruntime

        return onnxruntime.get_build_info()
    if name == "executorch":
        import executorch.version

        return f"commit {executorch.version.git_version}"
    return _llama_cpp_build() if name == "llama.cpp" else ""


def load_engine(
    model: str | Path | Artefact,
    options: EngineOptions | None = None,
    *,
    probe: bool = True,
    measure_passes: bool = True,
) -> EngineScheduler:
    """Load an artefact, or the one at a path, in the engine that its manifest or file type names.

    Files in a manifest are compared with its hashes. Without a manifest a child process loads the file first, because
    a damaged file can end the process (not with `probe=False`). Both results are cached. On Linux the weights
    move into huge pages, and malloc keeps larger blocks in its heap in the whole process from then on (see
    `huge_pages`). EngineOptions(huge_pages=False) leaves both out. With `measure_passes=False`, passes of several
    chats are timed only by a later `EngineScheduler.measure_passes`.

    Raise ArtefactError for a missing, damaged or foreign artefact, MissingExtraError for a missing engine package.
    """
    artefact = model if isinstance(model, Artefact) else Artefact.open(model)
    options = options or EngineOptions()
    if options.kv_cache != "auto" and artefact.engine != "llama.cpp":
        raise UsageError(
            f"--kv-cache {options.kv_cache}: the export of {artefact.path.name} fixed its cache type; use auto"
        )
    manifest = artefact.known_manifest
    loaded = _load(artefact, options, probe)
    engine = EngineScheduler(loaded, manifest.sampling if manifest else {})
    try:
        if measure_passes:
            engine.measure_passes()
        if options.warm_up:
            engine.prefill([0])
    except BaseException:
        engine.close()
        raise
    trim_heap()
    return engine


def _load(artefact: Artefact, options: EngineOptions, probe: bool) -> Any:
    """Return the loaded engine of `artefact`, see `load_engine`."""
    engine_class: Callable[[Path, EngineOptions], Engine] = find_engine(artefact).load()
    if artefact.engine == "llama.cpp":
        load_llama()  # a missing package is named before the file is read
    artefact.verify()
    if probe and artefact.known_manifest is None:
        # the child only tells whether the file loads; it must not measure for half a minute or load a second model
        child_options = asdict(options) | {"tune": False}
        probe_artefact(artefact, engine_version(artefact.engine), child_options)
    try:
        return engine_class(artefact.model_file, options)
    except (EfficientLLMError, OSError):
        raise
    except Exception as error:  # libraries raise anything for a file that they do not expect
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ArtefactError(f"{artefact.path}: {artefact.engine} cannot load it: {reason}") from error


def find_engine(artefact: Artefact) -> EntryPoint:
    """Return the entry point of the engine that runs `artefact`. Raise ArtefactError if there is none."""
    own = [EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in ENGINES.items()]
    known = {entry.name: entry for entry in [*own, *entry_points(group=ENTRY_POINT_GROUP)]}
    if artefact.engine not in known:
        remedy = EXTERNAL_RUNTIMES.get(artefact.engine, f"known: {', '.join(known)}")
        raise ArtefactError(f"{artefact.path} needs engine {artefact.engine!r}; {remedy}")
    return known[artefact.engine]
