"""Showing a run: a progress bar in a terminal, one line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..runtime.quantities import format_count, format_duration

LINE_SECONDS = 15.0
"""Seconds between lines where there is no terminal."""


class ProgressDisplay:
    """Tokens, loss, parameters left, tokens per second and time to go."""

    def __init__(self, total_tokens: int, start_tokens: int, silent: bool = False) -> None:
        """`silent`: show nothing (all ranks but the main one)."""
        self.silent = silent
        self.total = total_tokens
        self.start = start_tokens
        self.began = time.monotonic()
        self.last_line = -LINE_SECONDS
        self.bar: Progress | None = None
        self.console = Console(stderr=True)

    def __enter__(self) -> ProgressDisplay:
        if self.console.is_terminal and not self.silent:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("starting", total=self.total, completed=self.start)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, tokens: int, loss: float, parameters: int) -> None:
        elapsed = time.monotonic() - self.began
        speed = (tokens - self.start) / elapsed if elapsed else 0.0
        text = (
            f"{format_count(tokens)}/{format_count(self.total)} tokens  loss {loss:.3f}  "
            f"{format_count(parameters)} parameters  {speed:.0f} tokens/s"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=tokens, description=text)
        elif elapsed - self.last_line >= LINE_SECONDS or tokens >= self.total:
            self.last_line = elapsed
            remaining = (self.total - tokens) / speed if speed else 0.0
            self.say(f"{text}  ETA {format_duration(remaining)}")

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if self.silent:
            return
        if self.bar is not None:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
