"""SIGINT and SIGTERM as a request that a run can answer between two steps. Imports no torch."""

from __future__ import annotations

import signal
from typing import Any


class StopSignal:
    """Remembers the first signal of the block; a second one interrupts at once."""

    def __init__(self) -> None:
        self.name = ""
        """SIGINT or SIGTERM once it has come."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
