"""Run a command: print bad input as one line with exit code 2, and show a traceback only with --debug.

The packages report through `logging.getLogger("efficientllm")`. A command prints these messages as plain lines.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from .errors import EfficientLLMError
from .extras import NOISY_LOGGERS
from .files import REASONS
from .progress import PROGRESS_LOGGER

LOGGER = "efficientllm"
"""Logger of all our packages, which receives every message that a command prints."""

RANK_WAIT_SECONDS = 5
"""Seconds before a failed rank other than the first prints its error. torchrun checks its processes every 0.1 s."""


def is_main_process() -> bool:
    """Return True in the process that prints for all that torchrun started, and without torchrun."""
    return os.environ.get("RANK", "0") == "0"


class _PlainLines(logging.Handler):
    """Prints messages without decoration to the current sys.stdout or sys.stderr."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=getattr(sys, self._stream), flush=True)


def show_messages(details: bool = False) -> None:
    """Print reports on stdout and progress on stderr, in the main process only. With `details`, also debug messages."""
    level = logging.DEBUG if details else logging.INFO
    for name, stream in ((LOGGER, "stdout"), (PROGRESS_LOGGER, "stderr")):
        logger = logging.getLogger(name)
        logger.setLevel(level if is_main_process() else logging.ERROR)
        logger.propagate = False  # libraries configure the root logger, which would print each line again
        if not logger.handlers:
            logger.addHandler(_PlainLines(stream))


class _Terminated(KeyboardInterrupt):
    """Raised by SIGTERM, so that a command removes its unfinished files as it does after Ctrl-C."""


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """Raise _Terminated on SIGTERM inside the block, then end the process by the same signal."""
    # Python sets handlers in the main thread only, and a program that calls us may have its own
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
        return
    except _Terminated:
        print("terminated", file=sys.stderr, flush=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # not an exit code: whoever started the process sees that the signal ended it
    signal.raise_signal(signal.SIGTERM)


def run_command(body: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run `body(argv)` and return its exit code. An EfficientLLMError or OSError becomes one line on stderr and code 2.

    `--debug`, which every command accepts, is removed from argv and lets the traceback through.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    for name in () if debug else NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    arguments = [argument for argument in arguments if argument != "--debug"]
    show_messages(debug)
    # Windows redirects into an encoding without most characters
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _terminating():
            return body(arguments)
    except KeyboardInterrupt as error:
        print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as a shell shows it
    except (EfficientLLMError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader():
            sys.stderr.close()  # Python would report there that it cannot flush stdout
            return 141  # 128 + SIGPIPE
        if debug:
            raise
        _print_once(f"error: {' '.join(_describe(error).split())}")
        return 2


def _has_no_reader() -> bool:
    """Return True if nobody reads stdout any more. A child process that ended breaks another pipe."""
    if not hasattr(select, "poll"):
        return True
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file of this process
        return False
    poller = select.poll()
    poller.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poller.poll(0))


def _describe(error: Exception) -> str:
    """Return the text of `error`, with a remedy for the OS errors that name none."""
    code = error.errno if isinstance(error, OSError) else None
    remedy = {errno.ENAMETOOLONG: "give a shorter name", errno.EFBIG: f"{REASONS[errno.EFBIG]}; write elsewhere"}.get(
        code or 0
    )
    return f"{error}; {remedy}" if remedy else str(error)


def _print_once(line: str) -> None:
    """Print `line` on stderr, once if all processes that torchrun started on this machine fail alike."""
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank != "0":
        # torchrun ends this process meanwhile if the first rank has failed as well
        time.sleep(RANK_WAIT_SECONDS)
        line = f"rank {os.environ.get('RANK', rank)}: {line}"
    print(line, file=sys.stderr)
