"""The ONNX Runtime engine for decoders with a KV cache, as `efficientllm-export --target onnx` writes them.

Past and present share one preallocated buffer per layer, so that no cache is copied between tokens. If the operators of
a file cannot do that (`past_present_share_buffer` false in genai_config.json), each step's present is the next one's
past. G_i is the number of key/value heads of layer i, D the head width.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import ArtefactError
from ..base.extras import extra
from .artefact import GenaiConfig
from .engine import EngineOptions, context_length
from .memory import huge_pages, trim_heap
from .protocol import EvaluationInterrupted
from .stepwise import StepwiseEngine


@dataclass(frozen=True)
class CacheInput:
    """A graph input past_key_values.i.key or past_key_values.i.value."""

    name: str
    num_key_value_heads: int
    head_dim: int
    dtype: type[np.floating[Any]]

    @property
    def output(self) -> str:
        """Return the name of the output that is this input in the next step."""
        return self.name.replace("past_key_values", "present")

    def zeros(self, length: int) -> np.ndarray:
        """Return a cache of zeros, [1, G_i, length, D]."""
        return np.zeros((1, self.num_key_value_heads, length, self.head_dim), dtype=self.dtype)


def cache_inputs(items: Sequence[Any], decoder: dict[str, Any]) -> list[CacheInput]:
    """Return the caches among graph inputs.

    The graphs of onnxruntime-genai's builder have no sizes. They are in `decoder` of genai_config.json. Raise
    ArtefactError if both lack a size.
    """
    caches = []
    for item in items:
        if item.name.startswith("past_key_values."):
            _, heads, _, head_dim = item.shape
            try:
                heads = heads if isinstance(heads, int) else decoder["num_key_value_heads"]
                head_dim = head_dim if isinstance(head_dim, int) else decoder["head_size"]
            except KeyError as error:
                raise ArtefactError(
                    f"{item.name} has no size, and genai_config.json has no {error}; export the model again"
                ) from error
            dtype = np.float16 if "16" in item.type else np.float32
            caches.append(CacheInput(item.name, heads, head_dim, dtype))
    return caches


def _ort_value(array: np.ndarray) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


class SharedCache:
    """One buffer [1, G_i, context, D] for the keys and one for the values of each layer, input and output at once."""

    def __init__(self, inputs: list[CacheInput], binding: Any, context: int) -> None:
        self._arrays = [cache.zeros(context) for cache in inputs]
        self._buffers = [_ort_value(array) for array in self._arrays]  # views of the same memory
        for cache, buffer in zip(inputs, self._buffers, strict=True):
            binding.bind_ortvalue_input(cache.name, buffer)
            binding.bind_ortvalue_output(cache.output, buffer)

    def truncate(self, length: int) -> None:
        """Do nothing, because positions beyond `length` are overwritten."""

    def advance(self) -> None:
        """Do nothing, because the buffers hold the new positions already."""

    def copy(self, source: SharedCache, length: int) -> None:
        """Copy the first `length` positions of `source`."""
        for target, array in zip(self._arrays, source._arrays, strict=True):
            target[:, :, :length] = array[:, :, :length]


class GrowingCache:
    """Caches that grow with every step: its present becomes the next one's past."""

    def __init__(self, inputs: list[CacheInput], binding: Any) -> None:
        self._inputs, self._binding = inputs, binding
        self._past = [_ort_value(cache.zeros(0)) for cache in inputs]
        self._bind()

    def _bind(self) -> None:
        for cache, past in zip(self._inputs, self._past, strict=True):
            self._binding.bind_ortvalue_input(cache.name, past)
            self._binding.bind_output(cache.output, "cpu")

    def copy(self, source: GrowingCache, length: int) -> None:
        """Copy the first `length` positions of `source`."""
        self._past = source._past  # shared: every step writes its present into new memory
        self.truncate(length)
        self._bind()

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions."""
        if self._past and length < self._past[0].shape()[2]:
            kept = (np.ascontiguousarray(past.numpy()[:, :, :length]) for past in self._past)
            self._past = [_ort_value(array) for array in kept]
            self._bind()

    def advance(self) -> None:
        """Use the outputs of the last step, which are in the order of binding, as the past of the next one."""
        self._past = list(self._binding.get_outputs()[: len(self._inputs)])
        self._bind()


class OnnxEngine(StepwiseEngine):
    """An ONNX decoder, see `runtime.engines.protocol.Engine`."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        with extra("onnx"):
            import onnxruntime
        began = time.perf_counter()
        self._session = _open_session(onnxruntime, path, options)
        self._run_options = onnxruntime.RunOptions()
        config = GenaiConfig.read(path.parent)
        graph_inputs = self._session.get_inputs()
        inputs = cache_inputs(graph_inputs, config.decoder)
        others = {item.name for item in graph_inputs} - {cache.name for cache in inputs}
        logits = next((item for item in self._session.get_outputs() if item.name == "logits"), None)
        if others != {"input_ids", "attention_mask"} or logits is None:
            raise ArtefactError(f"{path} is not a decoder of efficientllm-export --target onnx; export it with that")
        self.context_length = context_length(options.context, config.context_length)
        self.num_sequences = options.sequences
        self._bindings = [self._session.io_binding() for _ in range(options.sequences)]
        self._caches: list[Any] = []
        for binding in self._bindings:
            if config.shares_cache:
                self._caches.append(SharedCache(inputs, binding, self.context_length))
            else:
                self._caches.append(GrowingCache(inputs, binding))
        super().__init__(path.parent)
        # Our graphs return the last token's logits, [1, 1, V]; other exporters' those of all tokens, [1, S, V].
        _, rows, self.vocab_size = logits.shape
        self._last_row_only = rows == 1
        self._logits = self._bind_logits(1)
        self.end_ids = config.end_ids
        # These zeros take no memory, because nothing writes to them.
        self.kv_cache_bytes = sum(cache.zeros(self.cache_slots).nbytes for cache in inputs)
        self.load_ms = (time.perf_counter() - began) * 1e3

    def _select(self, sequence: int) -> None:
        self._bindings[sequence].bind_ortvalue_output("logits", _ort_value(self._logits))

    def _copy(self, source: int, length: int) -> None:
        self._caches[self._current].copy(self._caches[source], length)

    def _truncate(self, length: int) -> None:
        self._caches[self._current].truncate(length)

    def _bind_logits(self, rows: int) -> np.ndarray:
        """Bind a buffer [1, rows, V] and return it."""
        # Without it the binding wraps every cache to return its outputs, which costs 3 % of a decode of a small model.
        buffer = np.empty((1, rows, self.vocab_size), dtype=np.float32)
        self._bindings[self._current].bind_ortvalue_output("logits", _ort_value(buffer))
        return buffer

    def _evaluate(self, tokens: list[int]) -> np.ndarray:
        binding = self._bindings[self._current]
        rows = 1 if self._last_row_only else len(tokens)
        if self._logits.shape[1] != rows:  # a prompt, if the graph returns the logits of all its tokens
            self._logits = self._bind_logits(rows)
        total = len(self._tokens) + len(tokens)
        binding.bind_cpu_input("input_ids", np.asarray([tokens], dtype=np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), dtype=np.int64))
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception:  # onnxruntime's exceptions have no common base
            if self._run_options.terminate:
                raise EvaluationInterrupted from None
            raise
        self._tokens += tokens
        self._caches[self._current].advance()
        return self._logits[0, -1].copy()  # the next run overwrites the buffer

    def interrupt(self) -> None:
        super().interrupt()
        self._run_options.terminate = True  # takes effect at the next operator

    def resume(self) -> None:
        super().resume()
        self._run_options.terminate = False

    def close(self) -> None:
        del self._bindings, self._caches, self._session
        trim_heap()


def _open_session(onnxruntime: Any, path: Path, options: EngineOptions) -> Any:
    """Load the file at `path` and return its onnxruntime.InferenceSession."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads or os.cpu_count() or 1
    settings.log_severity_level = 3
    try:
        with huge_pages(options.huge_pages):
            return onnxruntime.InferenceSession(str(path), settings, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ArtefactError(f"{path}: onnxruntime cannot load it: {str(error).splitlines()[0]}") from error
