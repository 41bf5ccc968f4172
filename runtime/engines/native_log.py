"""What a native library writes straight to file descriptor 2, kept from the terminal."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def captured_native_log(own_line: str) -> Iterator[Callable[[], str]]:
    """Catch the library's lines, which begin like the pattern `own_line`; yields a function that returns those so far.

    File descriptor 2 is the whole process's: what Python and other threads write to it meanwhile is shown when the
    block ends, so keep it short.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)

        def lines(own: bool) -> bytes:
            log.seek(0)
            return b"".join(line for line in log if bool(re.match(own_line.encode(), line)) is own)

        try:
            yield lambda: lines(own=True).decode("utf-8", errors="replace")
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            os.write(2, lines(own=False))
