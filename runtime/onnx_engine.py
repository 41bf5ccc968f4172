"""The ONNX Runtime engine: decoders with a KV cache, as `efficientllm-export --target onnx` writes them.

Past and present share one preallocated buffer per layer, so no cache is copied between tokens; files whose operators
cannot do that (`past_present_share_buffer` false in genai_config.json) get each step's present as the next one's past.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from .engine import DEFAULT_CONTEXT, EngineOptions
from .errors import ArtefactError, MissingExtraError
from .stepwise_engine import StepwiseEngine


def _zeros(item: Any, length: int) -> np.ndarray:
    """A cache [1, G, length, D] for a graph input."""
    _, groups, _, head_dim = item.shape
    return np.zeros((1, groups, length, head_dim), dtype=np.float16 if "float16" in item.type else np.float32)


def _ort_value(array: np.ndarray) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


class SharedCache:
    """One buffer [1, G_i, context, D] per layer and part, input and output at once."""

    def __init__(self, items: list[Any], binding: Any, context: int) -> None:
        self._buffers = [_ort_value(_zeros(item, context)) for item in items]
        for item, buffer in zip(items, self._buffers, strict=True):
            binding.bind_ortvalue_input(item.name, buffer)
            binding.bind_ortvalue_output(item.name.replace("past_key_values", "present"), buffer)

    def truncate(self, length: int) -> None:
        """Positions beyond `length` are overwritten: nothing to do."""

    def advance(self, outputs: Any) -> None:
        """The buffers hold the new positions already."""


class GrowingCache:
    """Every step's present becomes the next one's past."""

    def __init__(self, items: list[Any], binding: Any) -> None:
        self._items, self._binding = items, binding
        self._past = [_ort_value(_zeros(item, 0)) for item in items]
        self._bind()

    def _bind(self) -> None:
        for item, past in zip(self._items, self._past, strict=True):
            self._binding.bind_ortvalue_input(item.name, past)
            self._binding.bind_output(item.name.replace("past_key_values", "present"), "cpu")

    def truncate(self, length: int) -> None:
        if self._past and length < self._past[0].shape()[2]:
            kept = (np.ascontiguousarray(past.numpy()[:, :, :length]) for past in self._past)
            self._past = [_ort_value(array) for array in kept]
            self._bind()

    def advance(self, outputs: Any) -> None:
        """`outputs`: presents in the order they were bound, then others."""
        self._past = list(outputs[: len(self._items)])
        self._bind()


class OnnxEngine(StepwiseEngine):
    """See runtime.engine.Engine."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise MissingExtraError("onnxruntime", "onnx") from error
        began = time.perf_counter()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads or os.cpu_count() or 1
        settings.log_severity_level = 3
        try:
            # Folding constants would copy a tied, quantised embedding: it is read in two shapes.
            self._session = onnxruntime.InferenceSession(
                str(path), settings, ["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
            )
        except Exception as error:  # onnxruntime's exceptions share no base
            raise ArtefactError(f"{path}: onnxruntime cannot load it: {str(error).splitlines()[0]}") from error
        self._past = [item for item in self._session.get_inputs() if item.name.startswith("past_key_values.")]
        if {item.name for item in self._session.get_inputs()} - {item.name for item in self._past} != {
            "input_ids",
            "attention_mask",
        }:
            raise ArtefactError(f"{path} is not a decoder written by efficientllm-export --target onnx")
        genai = _genai_config(path.parent)
        config = genai.get("model", {})
        self.context_length = options.context or min(DEFAULT_CONTEXT, config.get("context_length", DEFAULT_CONTEXT))
        self._binding = self._session.io_binding()
        self._cache: SharedCache | GrowingCache
        if genai.get("search", {}).get("past_present_share_buffer", True):
            self._cache = SharedCache(self._past, self._binding, self.context_length)
        else:
            self._cache = GrowingCache(self._past, self._binding)
        self._binding.bind_output("logits", "cpu")
        super().__init__(path.parent)
        self.vocab_size = int(config.get("vocab_size", self.tokenizer.vocab_size))
        ends = config.get("eos_token_id", [])
        self.end_ids = frozenset(ends if isinstance(ends, list) else [ends])
        self.kv_cache_bytes = sum(_zeros(item, self.context_length).nbytes for item in self._past)
        self.load_ms = (time.perf_counter() - began) * 1e3

    def _truncate(self, length: int) -> None:
        self._cache.truncate(length)

    def _evaluate(self, tokens: list[int]) -> np.ndarray:
        total = len(self._tokens) + len(tokens)
        self._binding.bind_cpu_input("input_ids", np.asarray([tokens], dtype=np.int64))
        self._binding.bind_cpu_input("attention_mask", np.ones((1, total), dtype=np.int64))
        self._session.run_with_iobinding(self._binding)
        self._tokens += tokens
        outputs = self._binding.get_outputs()
        self._cache.advance(outputs)
        return outputs[-1].numpy()[0, -1].copy()  # the next run writes into the same memory

    def close(self) -> None:
        del self._binding, self._cache, self._session


def _genai_config(folder: Path) -> dict[str, Any]:
    path = folder / "genai_config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ArtefactError(f"{path} is malformed: {error}") from error
