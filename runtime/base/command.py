"""What every command shares: one clear line for bad input, exit code 2, a traceback only with --debug.

The packages report through `logging.getLogger("efficientllm")`; a command shows what they say as plain lines.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from .errors import EfficientLLMError
from .files import REASONS
from .progress import PROGRESS_LOGGER

LOGGER = "efficientllm"
"""Logger of all our packages: what a command prints below its command line is said to it."""

NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""transformers imports torchao where it is installed, which then warns of CUDA libraries that a CPU build lacks."""


OTHERS_WAIT_SECONDS = 5
"""torchrun looks at its processes every tenth of a second."""


def is_main_process() -> bool:
    """Whether this process speaks for all that torchrun started; alone, it does."""
    return os.environ.get("RANK", "0") == "0"


class _PlainLines(logging.Handler):
    """Messages as they are, on the stream that is `stdout` or `stderr` at that moment."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=getattr(sys, self._stream), flush=True)


def _show_messages() -> None:
    """Reports on standard output, progress on standard error, from one process of all that torchrun started."""
    for name, stream in ((LOGGER, "stdout"), (PROGRESS_LOGGER, "stderr")):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)
        logger.propagate = False
        if not logger.handlers:
            logger.addHandler(_PlainLines(stream))


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what it has half written goes with it."""


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """Within, SIGTERM raises _Terminated; behind it the process ends by the signal, as whoever sent it expects."""
    is_ours = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not is_ours:
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
    signal.raise_signal(signal.SIGTERM)


def run_command(body: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run `body(argv)`; an EfficientLLMError or an OS error becomes one line on stderr and exit code 2.

    `--debug`, accepted by every command, is taken out of argv and lets the traceback through.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    for name in () if debug else NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    arguments = [argument for argument in arguments if argument != "--debug"]
    _show_messages()
    try:
        with _terminating():
            return body(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except (EfficientLLMError, OSError) as error:
        if debug:
            raise
        _say_once(f"error: {' '.join(_said(error).split())}")
        return 2


def _said(error: Exception) -> str:
    """The system's own words say what is wrong, but not what to do."""
    code = error.errno if isinstance(error, OSError) else None
    remedy = {
        errno.ENAMETOOLONG: "give a shorter name",
        errno.EFBIG: f"{REASONS[errno.EFBIG]}; write elsewhere",
    }.get(code or 0)
    return f"{error}; {remedy}" if remedy else str(error)


def _say_once(line: str) -> None:
    """On stderr, once for all that torchrun started on this machine where they fail alike.

    When the first of them has failed, torchrun ends the others, which wait for that; one that failed alone speaks.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank != "0":
        time.sleep(OTHERS_WAIT_SECONDS)
        line = f"rank {os.environ.get('RANK', rank)}: {line}"
    print(line, file=sys.stderr)
