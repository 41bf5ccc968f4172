"""Read the windows of the next step in a thread while the current step is computed.

Windows and positions are those of a PackedStream to the bit. Text is tokenised outside Python's lock.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .documents import DataSpec
from .packing import PackedStream


class PrefetchedStream(PackedStream):
    """A PackedStream that reads ahead as many windows as the last call returned."""

    def __init__(self, specs: Sequence[DataSpec], tokenizer: PreTrainedTokenizerBase, *settings: Any) -> None:
        """Take the arguments of a PackedStream. The thread has a tokenizer of its own, as none may be set up in use."""
        super().__init__(specs, copy.deepcopy(tokenizer), *settings)
        self._worker = ThreadPoolExecutor(1, "windows")
        self._ahead: Future[np.ndarray] | None = None
        self._count = 0
        """Windows that the thread reads."""
        self._position: list[dict[str, Any]] = []
        """Position before them."""

    def next_windows(self, count: int) -> np.ndarray:
        """Return the next `count` windows, int64 [count, S + 1], and read as many ahead.

        An error of the text is raised by the call that returns its windows.
        """
        if count != self._count:
            self._rewind()
        ahead, self._ahead = self._ahead, None
        windows = ahead.result() if ahead is not None else super().next_windows(count)
        # noted before the thread moves it: a checkpoint needs the position after the windows that were returned
        self._position, self._count = super().state(), count
        self._ahead = self._worker.submit(super().next_windows, count)
        return windows

    def state(self) -> list[dict[str, Any]]:
        return self._position if self._ahead is not None else super().state()

    def load_state(self, state: list[dict[str, Any]]) -> None:
        self._wait()
        super().load_state(state)

    def switch_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._rewind()
        super().switch_tokenizer(copy.deepcopy(tokenizer))

    def _rewind(self) -> None:
        """Return to the position before the windows that were read ahead."""
        if self._ahead is not None:
            self.load_state(self._position)

    def _wait(self) -> None:
        """Wait for the thread, and drop its windows and errors."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.exception()
