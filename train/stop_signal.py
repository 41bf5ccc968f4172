"""SIGINT and SIGTERM as a request that a run can answer between two steps. Imports no torch."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopSignal:
    """Remembers the first signal of the block; a second one interrupts at once."""

    def __init__(self) -> None:
        self.name = ""
        """SIGINT or SIGTERM once it has come."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        in_main_thread = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if in_main_thread else ():  # no other may set handlers
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
