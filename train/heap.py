"""Trim the heap of a long run, which large tensors fragment."""

from __future__ import annotations

from ..runtime.engines.memory import memory_bytes, trim_heap


class HeapWatch:
    """Trim the heap when a process with kept pages (`compute.hardware.keep_freed_pages`) grows.

    Small long-lived tensors fill holes of large tensors, which then find room only at the end of the heap: 58 MB more
    every few steps, 4.4 GB became 10 in 550 steps of SmolLM2-135M. Free memory returns to the kernel when the process
    holds GROWTH times its size after the last trim. The next step faults it in again.
    """

    GROWTH = 1.15

    def __init__(self) -> None:
        self._usual = 0
        """Resident bytes at the end of the first step after a trim; 0: unknown."""

    def begin_anew(self) -> None:
        """Forget the usual size, after the model changed."""
        self._usual = 0

    def look(self) -> bool:
        """Trim if needed at the end of a step, and tell whether memory was returned."""
        held = memory_bytes().get("rss_bytes", 0)  # Linux only
        self._usual = self._usual or held
        if held <= self.GROWTH * self._usual:
            return False
        trim_heap()
        self._usual = 0
        return True
