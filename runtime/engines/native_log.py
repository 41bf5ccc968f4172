"""What a native library writes straight to file descriptor 2, kept from the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def captured_native_log() -> Iterator[Callable[[], str]]:
    """Catch stderr at the level of the operating system; yields a function that returns what has been written so far.

    Python's own messages of the block are caught as well; other threads' too, so keep the block short.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)

        def read() -> str:
            log.seek(0)
            return log.read().decode("utf-8", errors="replace")

        try:
            yield read
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
