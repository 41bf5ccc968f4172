"""A thread of llama.cpp's own, where torch shares the process.

On a CPU with AMX both compute in tile registers, which belong to a thread. llama.cpp sets them up once for each thread;
torch (oneDNN) sets them up anew for its products in bf16 and leaves them so. In a thread that went from one to the
other and back, llama.cpp's next product of quantised weights is an illegal instruction: the process ends. So where
torch is loaded, llama.cpp computes in a thread that torch never enters; elsewhere, as in the server, in the caller's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class OwnThread:
    """Runs the computations of one context."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def run(self, compute: Callable[..., int], *arguments: Any) -> int:
        """compute(*arguments), in whichever thread is safe."""
        if "torch" not in sys.modules:
            return compute(*arguments)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "llama.cpp")
        return self._thread.submit(compute, *arguments).result()

    def close(self) -> None:
        """End the thread, if there is one."""
        if self._thread is not None:
            self._thread.shutdown()
