"""The onnxruntime-genai engine: a model folder of onnxruntime-genai in that package's own runtime.

It is the reference that our ONNX engine is compared with. Folders of `efficientllm-export --target onnx` run in it as
well, but their manifest names onnxruntime, which is as fast and needs no further package.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import ArtefactError
from ..base.extras import extra
from .artefact import GENAI_CONFIG, GenaiConfig
from .engine import EngineOptions, context_length
from .manifest import manifest_cache_bytes
from .memory import huge_pages, trim_heap
from .stepwise import StepwiseEngine


class GenaiEngine(StepwiseEngine):
    """A model of onnxruntime-genai, see `runtime.engines.protocol.Engine`."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        with extra("genai", "onnxruntime-genai"):
            genai: Any = importlib.import_module("onnxruntime_genai")  # it has no stubs
        began = time.perf_counter()
        folder = path.parent
        config = GenaiConfig.read(folder)
        if not config.vocab_size:
            raise ArtefactError(f"{folder / GENAI_CONFIG} has no vocab_size; export the model again")
        session = {"session_options": {"intra_op_num_threads": options.threads or os.cpu_count() or 1}}
        try:
            with huge_pages(options.huge_pages):
                settings = genai.Config(str(folder))
                settings.overlay(json.dumps({"model": {"decoder": session}}))
                self._model = genai.Model(settings)
        except Exception as error:  # its exceptions have no common base
            raise ArtefactError(f"{folder}: onnxruntime-genai cannot load it: {str(error).splitlines()[0]}") from error
        self.context_length = context_length(options.context, config.context_length)
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self.context_length, do_sample=False)
        self._generator: Any = genai.Generator(self._model, parameters)
        super().__init__(folder)
        self.vocab_size, self.end_ids = config.vocab_size, config.end_ids
        self.kv_cache_bytes = manifest_cache_bytes(folder, self.context_length)
        self.load_ms = (time.perf_counter() - began) * 1e3

    def _truncate(self, length: int) -> None:
        if length < len(self._tokens):
            self._generator.rewind_to(length)

    def _evaluate(self, tokens: list[int]) -> np.ndarray:
        self._generator.append_tokens(np.asarray(tokens, dtype=np.int32))
        self._tokens += tokens
        return self._generator.get_logits().reshape(-1, self.vocab_size)[-1].astype(np.float32)

    def close(self) -> None:
        del self._generator, self._model
        trim_heap()
