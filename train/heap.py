"""The heap of a long run, which large tensors leave in pieces."""

from __future__ import annotations

from ..runtime.engines.memory import memory_bytes, trim_heap


class HeapWatch:
    """Keeps a heap whose pages are kept (`compute.hardware.keep_freed_pages`) from growing without end.

    Small things that live long come to lie in holes of large tensors, which then find room at the end of the heap only:
    58 MB more every few steps, 4.4 GB became 10 in 550 steps of SmolLM2-135M. What is free goes back to the kernel when
    the process holds GROWTH times what it held after the last time; the next step faults it in again.
    """

    GROWTH = 1.15

    def __init__(self) -> None:
        self._usual = 0
        """Resident bytes at the end of the first step since then; 0: not known yet."""

    def begin_anew(self) -> None:
        """What a step takes is another from now on."""
        self._usual = 0

    def look(self) -> bool:
        """At the end of a step: whether memory was given back."""
        held = memory_bytes().get("rss_bytes", 0)  # Linux only
        self._usual = self._usual or held
        if held <= self.GROWTH * self._usual:
            return False
        trim_heap()
        self._usual = 0
        return True
