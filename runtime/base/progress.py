"""Showing how far long work has come: bars in a terminal, one line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .quantities import format_duration

PROGRESS_LOGGER = "efficientllm.progress"
"""Its lines are for whoever is waiting, not for whoever reads the result."""

LINE_SECONDS = 15.0
"""Seconds between lines where there is no terminal."""

_log = logging.getLogger(PROGRESS_LOGGER)


@dataclass
class _Task:
    """One thing under way."""

    began: float
    start: int
    """What was done already when it was first shown."""
    bar: TaskID | None = None


class ProgressDisplay:
    """Progress of one or several things after each other, on stderr as it was when the display was made.

    A program that did not ask to see messages (see `logging`) sees nothing.
    """

    def __init__(self, silent: bool = False) -> None:
        """`silent`: show nothing, as on all ranks but the main one."""
        self._silent = silent
        self._tasks: dict[str, _Task] = {}
        self._last_line = -LINE_SECONDS
        console = Console(file=sys.stderr)  # tools that capture stderr for a while do not catch the bar
        shows_bars = console.is_terminal and not silent and _log.isEnabledFor(logging.INFO)
        self._bars: Progress | None = None
        if shows_bars:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def __enter__(self) -> ProgressDisplay:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, name: str, done: int, total: int, text: str = "") -> None:
        """`done` of `total` of what is called `name`; `text` is shown in place of the name and the count."""
        now = time.monotonic()
        task = self._tasks.setdefault(name, _Task(now, done))
        if self._bars is not None:
            if task.bar is None:
                task.bar = self._bars.add_task(name, total=total)
            # a total may grow: mmlu's 57 subjects arrive one after the other under one name
            self._bars.update(task.bar, completed=done, total=total, description=text or f"{name} {done}/{total}")
        elif now - self._last_line >= LINE_SECONDS or done >= total:
            self._last_line = now
            speed = (done - task.start) / (now - task.began) if now > task.began else 0.0
            remaining = f"  ETA {format_duration(max(0, total - done) / speed)}" if speed else ""
            self.say(f"{text or f'{name}: {done}/{total}'}{remaining}")

    def say(self, text: str) -> None:
        """One line, above the bars where there are any."""
        if self._silent:
            return
        if self._bars is not None:
            self._bars.console.print(text, highlight=False)
        else:
            _log.info(text)
