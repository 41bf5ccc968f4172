"""Handle SIGINT and SIGTERM as a request that a run answers at safe points. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class StopRequested(KeyboardInterrupt):
    """A signal requested a stop, and the run is at a safe point."""


class StopSignal:
    """Record the first signal in the block for `check`.

    A second one interrupts at once, and during `saving` a third one. Under torchrun none does: a scheduler signals all
    processes, and torchrun passes its signal on to the ranks.
    """

    def __init__(self, any_rank: Callable[[bool], bool] | None = None) -> None:
        """Create the handler.

        `any_rank` tells whether a flag is set on any rank (a collective call); None for one process.
        """
        self.name = ""
        """SIGINT or SIGTERM after the signal."""
        self._any_rank = any_rank
        self._is_held = False
        self._is_saving = self._is_interrupted = False
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
        if self.name and "WORLD_SIZE" not in os.environ:
            if not self._is_saving:
                self._is_interrupted = True
                raise KeyboardInterrupt
            self._is_saving = False
            # not through sys.stderr, in whose write this handler may run
            os.write(2, b"the checkpoint is being written; a further signal gives it up\n")
        self.name = signal.Signals(number).name

    def check(self) -> None:
        """Raise StopRequested if any rank received a signal (a collective call)."""
        if self._is_held:
            return
        if self._any_rank(bool(self.name)) if self._any_rank is not None else self.name:
            raise StopRequested(self.name or "a signal to another rank")

    def check_alone(self) -> None:
        """Call `check` with one rank only, for places where ranks do not synchronise."""
        if self._any_rank is None:
            self.check()

    @contextlib.contextmanager
    def held(self, condition: bool = True) -> Iterator[None]:
        """Ignore signals in this block if `condition` holds."""
        before, self._is_held = self._is_held, self._is_held or condition
        try:
            yield
        finally:
            self._is_held = before

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Answer a second signal with a line while a checkpoint is written. A third one raises KeyboardInterrupt."""
        self._is_saving = True
        try:
            yield
        except BaseException as error:  # torch wraps a KeyboardInterrupt in an exception of its own
            if self._is_interrupted:
                raise KeyboardInterrupt("this checkpoint is not written, and earlier ones stay") from error
            raise
        finally:
            self._is_saving = False
