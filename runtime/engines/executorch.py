"""The ExecuTorch engine: programs with static caches, as `efficientllm-export --target executorch` writes them.

A .pte of anybody's runs too, where it has the interface of ExecuTorch's own LLM runner: `forward(tokens int64 [1, S],
input_pos int64 [1]) -> logits [1, V] or [1, S, V]`, its constant methods, and tokenizer.json beside it.

Importing ExecuTorch's Python packages in the one order that works.

What a native library writes straight to file descriptor 2, kept from the terminal.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..base.command import LOGGER
from ..base.errors import ArtefactError
from ..base.extras import extra
from .engine import EngineOptions
from .manifest import manifest_cache_bytes
from .memory import give_back_freed_memory, huge_pages
from .stepwise import StepwiseEngine

_IN_ORDER = (
    "executorch.extension.pybindings.portable_lib",
    "executorch.runtime",
    "executorch.extension.llm.custom_ops.custom_ops",  # llama::update_cache, llama::custom_sdpa
    "executorch.kernels.quantized",  # quantized_decomposed::embedding_*; before the others, XNNPACK fails to initialise
)


def import_executorch() -> None:
    """Register ExecuTorch's operators, for export and for running; MissingExtraError where it is not installed."""
    with extra("executorch"), quiet_executorch():
        for name in _IN_ORDER:
            importlib.import_module(name)


@contextlib.contextmanager
def quiet_executorch() -> Iterator[None]:
    """Without the warnings and progress messages of ExecuTorch's Python code; errors are shown."""
    ours = logging.getLogger(LOGGER)
    wanted = {ours: ours.getEffectiveLevel()}  # else it would be the root's
    wanted |= {logging.getLogger(name): logging.ERROR for name in (None, "executorch", "torch", "torchao")}
    levels = {logger: logger.level for logger in wanted}
    for logger, level in wanted.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextlib.contextmanager
def captured_native_log(own_line: str) -> Iterator[Callable[[], str]]:
    """Catch the library's lines, which begin like the pattern `own_line`; yields a function that returns those so far.

    File descriptor 2 is the whole process's: what Python and other threads write to it meanwhile is shown when the
    block ends, so keep it short.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)

        def lines(own: bool) -> bytes:
            log.seek(0)
            return b"".join(line for line in log if bool(re.match(own_line.encode(), line)) is own)

        try:
            yield lambda: lines(own=True).decode("utf-8", errors="replace")
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            os.write(2, lines(own=False))


LOG_LINE = r"\[\w+\.\w+:\d+\]|(Error|Warning) in (XNNPACK|cpuinfo): "
"""How messages of ExecuTorch, as [method.cpp:1247], and of the libraries in it begin."""

PIECE = 256
"""Tokens of a prompt that one call of the program evaluates: an answer that nobody wants ends with a call."""


class ExecuTorchEngine(StepwiseEngine):
    """See runtime.engines.engine.Engine."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        import_executorch()
        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        self._torch = torch
        began = time.perf_counter()
        with huge_pages(options.huge_pages), captured_native_log(LOG_LINE) as log:
            portable_lib._unsafe_reset_threadpool(options.threads or os.cpu_count() or 1)
            try:
                self._program = Runtime.get().load_program(path)
                self._forward: Any = self._program.load_method("forward")
            except Exception as error:  # ExecuTorch's exceptions share no base
                reason = (log().strip() or str(error)).splitlines()[-1]
                raise ArtefactError(f"{path}: ExecuTorch cannot load it: {reason}") from error
        if self._forward is None or self._forward.metadata.num_inputs() != 2:
            raise ArtefactError(f"{path} is not a language model: its forward does not take (tokens, input_pos)")
        longest = int(self._constant("get_max_seq_len", 128))
        slots = int(self._constant("get_max_context_len", longest))
        # ExecuTorch's exporters, ours too, bound the tokens of one call by one less
        self._chunk = max(1, min(longest - 1, PIECE)) if self._constant("enable_dynamic_shape", False) else 1
        if options.context > slots:
            raise ArtefactError(
                f"{path} holds {slots} tokens, not {options.context}; export it again with --max-context "
                f"{options.context}"
            )
        self.context_length = options.context or slots
        super().__init__(path.parent)
        self.vocab_size = int(self._constant("get_vocab_size", self.tokenizer.vocab_size))
        self.end_ids = frozenset(int(token) for token in self._constants("get_eos_ids"))
        self.kv_cache_bytes = manifest_cache_bytes(path.parent, slots)
        self.load_ms = (time.perf_counter() - began) * 1e3

    def _constants(self, name: str) -> list[Any]:
        """What a constant method returns; nothing where the program lacks it."""
        if name not in self._program.method_names:
            return []
        method: Any = self._program.load_method(name)
        return list(method.execute(()))

    def _constant(self, name: str, default: Any) -> Any:
        values = self._constants(name)
        return values[0] if values else default

    def _truncate(self, length: int) -> None:
        """Positions beyond `length` are overwritten: nothing to do."""

    def _evaluate(self, tokens: list[int]) -> np.ndarray:
        logits = np.empty(0, np.float32)
        for begin in range(0, len(tokens), self._chunk):
            self._stop_if_interrupted()
            logits = self._execute(tokens[begin : begin + self._chunk])
        return logits

    def _execute(self, tokens: list[int]) -> np.ndarray:
        tensor = self._torch.tensor
        position = tensor([len(self._tokens)], dtype=self._torch.int64)
        logits = self._forward.execute([tensor([tokens], dtype=self._torch.int64), position])[0]
        self._tokens += tokens
        return logits.reshape(-1, logits.shape[-1])[-1].float().numpy().copy()  # the next call reuses the memory

    def close(self) -> None:
        del self._forward, self._program
        give_back_freed_memory()
