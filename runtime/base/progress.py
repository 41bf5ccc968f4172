"""Show the progress of long work: bars in a terminal, a line every 15 seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .quantities import format_duration

PROGRESS_LOGGER = "efficientllm.progress"
"""Logger of progress messages, which a command prints on stderr."""

LINE_SECONDS = 15.0
"""Seconds between lines without a terminal."""

_log = logging.getLogger(PROGRESS_LOGGER)


@dataclass
class _Task:
    """A task in progress."""

    began: float
    """Time of the first update, as time.monotonic."""
    first_done: int
    """Amount done at the first update."""
    done: int
    """Amount done at the last update."""
    bar: TaskID | None = None


class ProgressDisplay:
    """Shows the progress of tasks on stderr. Without a handler of PROGRESS_LOGGER nothing is shown."""

    def __init__(self, silent: bool = False) -> None:
        """Start without tasks. A `silent` display shows nothing, as on all ranks except the main one."""
        self._silent = silent
        self._tasks: dict[str, _Task] = {}
        self._last_line = -LINE_SECONDS
        console = Console(file=sys.stderr)  # the present stderr, because tools may redirect it later
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
        """Show `done` of `total` of the task `name`. `text` replaces the name and the count."""
        now = time.monotonic()
        task = self._tasks.get(name)
        if task is None or done < task.done:  # a task that is repeated
            if self._bars is not None and task is not None and task.bar is not None:
                self._bars.remove_task(task.bar)
            task = self._tasks[name] = _Task(now, done, done)
        task.done = done
        if self._bars is not None:
            if task.bar is None:
                task.bar = self._bars.add_task(name, total=total)
            # a total may grow: the 57 subjects of mmlu are one task
            self._bars.update(task.bar, completed=done, total=total, description=text or f"{name} {done}/{total}")
        elif now - self._last_line >= LINE_SECONDS or done >= total:
            self._last_line = now
            # from the first update on: a resumed task begins in the middle
            speed = (done - task.first_done) / (now - task.began) if now > task.began else 0.0
            remaining = f"  ETA {format_duration(max(0, total - done) / speed)}" if speed else ""
            self.say(f"{text or f'{name}: {done}/{total}'}{remaining}")

    def say(self, text: str) -> None:
        """Print one line, above the bars if there are any."""
        if self._silent:
            return
        if self._bars is not None:
            self._bars.console.print(text, highlight=False)
        else:
            _log.info(text)
