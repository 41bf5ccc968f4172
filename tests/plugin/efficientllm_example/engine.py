"""The engine of `--target bigram` artefacts."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from efficientllm.runtime.engines.engine import DEFAULT_CONTEXT, EngineOptions
from efficientllm.runtime.engines.stepwise import StepwiseEngine


class BigramEngine(StepwiseEngine):
    """See efficientllm.runtime.engines.protocol.Engine."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        began = time.perf_counter()
        self._table = np.load(path).astype(np.float32)
        self.vocab_size = len(self._table)
        self.context_length = options.context or DEFAULT_CONTEXT
        self.kv_cache_bytes = 0
        super().__init__(path.parent)
        self.end_ids = frozenset(self.tokenize(self.eos_token, special=True))
        self.load_ms = (time.perf_counter() - began) * 1e3

    def _evaluate(self, tokens: list[int]) -> np.ndarray:
        self._tokens += tokens
        return self._table[tokens[-1]]

    def _truncate(self, length: int) -> None:
        """No cache depends on the tokens."""

    def close(self) -> None:
        del self._table
