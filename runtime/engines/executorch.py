"""The ExecuTorch engine for programs with static caches, as `efficientllm-export --target executorch` writes them.

Other .pte files run as well if they have the interface of ExecuTorch's own LLM runner: `forward(tokens int64 [1, S],
input_pos int64 [1]) -> logits [1, V] or [1, S, V]`, its constant methods, and tokenizer.json in the folder.
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
from .memory import huge_pages, trim_heap
from .stepwise import StepwiseEngine

_IMPORT_ORDER = (
    "executorch.extension.pybindings.portable_lib",
    "executorch.runtime",
    "executorch.extension.llm.custom_ops.custom_ops",  # llama::update_cache, llama::custom_sdpa
    "executorch.kernels.quantized",  # quantized_decomposed::embedding_*
)
"""Modules that register operators. XNNPACK fails to initialise if `kernels.quantized` is imported before the others."""

LOG_LINE = r"\[\w+\.\w+:\d+\]|(Error|Warning) in (XNNPACK|cpuinfo): "
"""Pattern of the beginning of messages of ExecuTorch, such as [method.cpp:1247], and of the libraries in it."""

MAX_CALL_TOKENS = 256
"""Largest number of prompt tokens that one call evaluates. An interrupt takes effect after a call."""


def import_executorch() -> None:
    """Register ExecuTorch's operators for export and inference. Raise MissingExtraError if it is not installed."""
    with extra("executorch"), quiet_executorch():
        for name in _IMPORT_ORDER:
            importlib.import_module(name)


@contextlib.contextmanager
def quiet_executorch() -> Iterator[None]:
    """Hide the warnings and progress messages of ExecuTorch's Python code within the block, but not its errors."""
    ours = logging.getLogger(LOGGER)
    wanted = {ours: ours.getEffectiveLevel()}  # otherwise our logger would inherit the root's new level
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
    """Keep the lines of a native library that begin with the pattern `own_line` off the terminal.

    Yield a function that returns these lines. The library writes to file descriptor 2 of the whole process, so lines of
    Python and of other threads are captured as well. They are printed when the block ends, so keep it short.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)

        pattern = re.compile(own_line.encode())

        def lines(own: bool) -> bytes:
            log.seek(0)
            return b"".join(line for line in log if bool(pattern.match(line)) is own)

        try:
            yield lambda: lines(own=True).decode("utf-8", errors="replace")
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            os.write(2, lines(own=False))


class ExecuTorchEngine(StepwiseEngine):
    """An ExecuTorch program, see `runtime.engines.protocol.Engine`."""

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
            except Exception as error:  # ExecuTorch's exceptions have no common base
                reason = (log().strip() or str(error)).splitlines()[-1]
                raise ArtefactError(f"{path}: ExecuTorch cannot load it: {reason}") from error
        if self._forward is None or self._forward.metadata.num_inputs() != 2:
            raise ArtefactError(
                f"{path} is not a language model: its forward does not take (tokens, input_pos); export it again"
            )
        longest = int(self._constant("get_max_seq_len", 128))
        slots = int(self._constant("get_max_context_len", longest))
        # ExecuTorch's exporters, and ours, limit the tokens of one call to one less than the longest sequence.
        has_dynamic_shape = self._constant("enable_dynamic_shape", False)
        self._call_tokens = max(1, min(longest - 1, MAX_CALL_TOKENS)) if has_dynamic_shape else 1
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
        """Return the values of a constant method, [] if the program lacks it."""
        if name not in self._program.method_names:
            return []
        method: Any = self._program.load_method(name)
        return list(method.execute(()))

    def _constant(self, name: str, default: Any) -> Any:
        values = self._constants(name)
        return values[0] if values else default

    def _truncate(self, length: int) -> None:
        """Do nothing, because positions beyond `length` are overwritten."""

    def _evaluate(self, tokens: list[int]) -> np.ndarray:
        logits = np.empty(0, np.float32)
        for begin in range(0, len(tokens), self._call_tokens):
            self._stop_if_interrupted()
            logits = self._execute(tokens[begin : begin + self._call_tokens])
        return logits

    def _execute(self, tokens: list[int]) -> np.ndarray:
        tensor = self._torch.tensor
        position = tensor([len(self._tokens)], dtype=self._torch.int64)
        logits = self._forward.execute([tensor([tokens], dtype=self._torch.int64), position])[0]
        self._tokens += tokens
        return logits.reshape(-1, logits.shape[-1])[-1].float().numpy().copy()  # the next call overwrites them

    def close(self) -> None:
        del self._forward, self._program
        trim_heap()
