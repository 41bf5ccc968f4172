"""SIGINT and SIGTERM as a request that a run answers where it can. Imports no torch."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class StopRequested(KeyboardInterrupt):
    """A signal asked the run to stop, and it is at a place where it can."""


class StopSignal:
    """Remembers the first signal of the block, for `check` to answer; a second one interrupts at once."""

    def __init__(self, any_rank: Callable[[bool], bool] | None = None) -> None:
        """`any_rank` returns whether a flag is set on any rank, a collective call; None where there is one process."""
        self.name = ""
        """SIGINT or SIGTERM once it has come."""
        self._any_rank = any_rank
        self._is_held = False
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

    def check(self) -> None:
        """Raise StopRequested where a signal came to any rank; a collective call."""
        if self._is_held:
            return
        if self._any_rank(bool(self.name)) if self._any_rank is not None else self.name:
            raise StopRequested(self.name or "a signal to another rank")

    def check_alone(self) -> None:
        """`check` for places where ranks do not wait for each other: under several ranks, do nothing."""
        if self._any_rank is None:
            self.check()

    @contextlib.contextmanager
    def held(self, condition: bool = True) -> Iterator[None]:
        """Answer no signal within, where `condition` holds."""
        before, self._is_held = self._is_held, self._is_held or condition
        try:
            yield
        finally:
            self._is_held = before
