"""The ONNX Runtime engine: decoders with a KV cache, as `efficientllm-export --target onnx` writes them.

Past and present share one preallocated buffer per layer, so no cache is copied between tokens; files whose operators
cannot do that (`past_present_share_buffer` false in genai_config.json) get each step's present as the next one's past.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import ArtefactError
from ..base.extras import extra
from .engine import DEFAULT_CONTEXT, EngineOptions
from .genai_config import GenaiConfig
from .huge_pages import huge_pages
from .memory import give_back_freed_memory
from .onnx_cache import GrowingCache, SharedCache, cache_inputs, ort_value
from .protocol import EvaluationInterrupted
from .stepwise import StepwiseEngine


class OnnxEngine(StepwiseEngine):
    """See runtime.engines.engine.Engine."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        with extra("onnx"):
            import onnxruntime
        began = time.perf_counter()
        self._session = _open_session(onnxruntime, path, options)
        self._run_options = onnxruntime.RunOptions()
        config = GenaiConfig.read(path.parent)
        inputs = cache_inputs(self._session.get_inputs(), config.decoder)
        others = {item.name for item in self._session.get_inputs()} - {cache.name for cache in inputs}
        logits = next((item for item in self._session.get_outputs() if item.name == "logits"), None)
        if others != {"input_ids", "attention_mask"} or logits is None:
            raise ArtefactError(f"{path} is not a decoder written by efficientllm-export --target onnx")
        self.context_length = options.context or min(DEFAULT_CONTEXT, config.context_length or DEFAULT_CONTEXT)
        self.num_sequences = options.sequences
        self._bindings = [self._session.io_binding() for _ in range(options.sequences)]
        self._caches: list[Any] = [
            SharedCache(inputs, binding, self.context_length) if config.shares_cache else GrowingCache(inputs, binding)
            for binding in self._bindings
        ]
        super().__init__(path.parent)
        # ours give the last token's logits only, [1, 1, V]; other exporters those of all tokens, [1, S, V]
        _, rows, self.vocab_size = logits.shape
        self._last_row_only = rows == 1
        self._logits = self._bind_logits(1)
        self.end_ids = config.end_ids
        # a cache's zeros cost no memory: nothing writes to them
        self.kv_cache_bytes = sum(cache.zeros(self.cache_slots).nbytes for cache in inputs)
        self.load_ms = (time.perf_counter() - began) * 1e3

    def _select(self, sequence: int) -> None:
        self._bindings[sequence].bind_ortvalue_output("logits", ort_value(self._logits))

    def _copy(self, source: int, length: int) -> None:
        self._caches[self._current].copy(self._caches[source], length)

    def _truncate(self, length: int) -> None:
        self._caches[self._current].truncate(length)

    def _bind_logits(self, rows: int) -> np.ndarray:
        """A buffer [1, rows, V]: asking the binding for its outputs would wrap every cache, 3 % of a small decode."""
        buffer = np.empty((1, rows, self.vocab_size), dtype=np.float32)
        self._bindings[self._current].bind_ortvalue_output("logits", ort_value(buffer))
        return buffer

    def _evaluate(self, tokens: list[int]) -> np.ndarray:
        binding = self._bindings[self._current]
        rows = 1 if self._last_row_only else len(tokens)
        if self._logits.shape[1] != rows:
            self._logits = self._bind_logits(rows)
        total = len(self._tokens) + len(tokens)
        binding.bind_cpu_input("input_ids", np.asarray([tokens], dtype=np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), dtype=np.int64))
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception:  # onnxruntime's exceptions share no base
            if self._run_options.terminate:
                raise EvaluationInterrupted from None
            raise
        self._tokens += tokens
        self._caches[self._current].advance()
        return self._logits[0, -1].copy()  # the next run writes into the same memory

    def interrupt(self) -> None:
        super().interrupt()
        self._run_options.terminate = True  # at its next operator

    def resume(self) -> None:
        super().resume()
        self._run_options.terminate = False

    def close(self) -> None:
        del self._bindings, self._caches, self._session
        give_back_freed_memory()


def _open_session(onnxruntime: Any, path: Path, options: EngineOptions) -> Any:
    """An onnxruntime.InferenceSession."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads or os.cpu_count() or 1
    settings.log_severity_level = 3
    try:
        # Folding constants would copy a tied, quantized embedding: it is read in two shapes.
        with huge_pages(options.huge_pages):
            return onnxruntime.InferenceSession(
                str(path), settings, ["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
            )
    except Exception as error:  # onnxruntime's exceptions share no base
        raise ArtefactError(f"{path}: onnxruntime cannot load it: {str(error).splitlines()[0]}") from error
