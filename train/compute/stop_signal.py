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
    """Record the first signal in the block for `check`, and name it at once, also amid a long backward pass.

    A second one is answered with a line, and a third one interrupts. Under torchrun only the first counts: a scheduler
    signals all processes, and torchrun passes its signal on to the ranks.
    """

    def __init__(
        self, any_rank: Callable[[bool], bool] | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Create the handler.

        `any_rank` tells whether a flag is set on any rank (a collective call); None for one process. `say` prints a
        line, in a thread.
        """
        self.name = ""
        """SIGINT or SIGTERM after the signal."""
        self._any_rank, self._say = any_rank, say
        self._is_held = False
        self._is_received = self._is_repeated = self._is_interrupted = False
        self._announced = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            arrived, self._arrival = os.pipe()
            os.set_blocking(self._arrival, False)
            # Python calls a handler only between two bytecodes, and a backward pass may take a minute
            self._previous_wakeup = signal.set_wakeup_fd(self._arrival, warn_on_full_buffer=False)
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
            self._announcer = threading.Thread(target=self._announce, args=(arrived,), daemon=True)
            self._announcer.start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            signal.set_wakeup_fd(self._previous_wakeup)
            os.close(self._arrival)
            self._announcer.join(1)  # a line that comes late would stand behind the last one

    def _announce(self, arrived: int) -> None:
        """Say that the run will stop when the number of the first signal comes out of the pipe `arrived`."""
        with open(arrived, "rb", buffering=0) as numbers:
            while number := numbers.read(1):  # until the end of the block: a write into a closed pipe fails
                if not self._announced.is_set() and number[0] in self._previous:
                    name = signal.Signals(number[0]).name
                    with contextlib.suppress(OSError, ValueError):  # nobody reads it
                        self._say(f"{name}: stopping after the current step, then a checkpoint is written")
                    self._announced.set()

    def _remember(self, number: int, frame: object) -> None:
        if self.name and "WORLD_SIZE" not in os.environ:
            if self._is_repeated:
                self._is_interrupted = True
                raise KeyboardInterrupt
            self._is_repeated = True
            # not through sys.stderr, in whose write this handler may run
            os.write(2, b"the run writes a checkpoint before it stops; a further signal gives it up\n")
        self.name, self._is_received = signal.Signals(number).name, True

    def check(self) -> None:
        """Raise StopRequested if any rank received a signal (a collective call)."""
        if self._is_held:
            return
        if self._any_rank(bool(self.name)) if self._any_rank is not None else self.name:
            if self._is_received:
                self._announced.wait()  # so that its line comes before those of the stop
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
        """Raise KeyboardInterrupt with a message if a third signal interrupts the checkpoint of this block."""
        try:
            yield
        except BaseException as error:  # torch wraps a KeyboardInterrupt in an exception of its own
            if self._is_interrupted:
                raise KeyboardInterrupt("this checkpoint is not written, and earlier ones stay") from error
            raise
