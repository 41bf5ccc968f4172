"""Keep the stack on which Linux handles a thread's signals, which OpenVINO exchanges."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator


class SignalStack(ctypes.Structure):
    """The fields of C's stack_t on Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> SignalStack:
    """Return the alternate signal stack of the calling thread."""
    stack = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return stack


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Restore the alternate signal stack of the calling thread after the block, on Linux.

    OpenVINO 2026.4's CPU plug-in gives the thread a stack of its own. Where two plug-ins are unloaded in the order in
    which they were loaded, the thread keeps a stack that is freed, and its next signal, as Ctrl-C, ends the process.
    """
    if sys.platform != "linux":
        yield
        return
    before = signal_stack()
    try:
        yield
    finally:
        ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)
