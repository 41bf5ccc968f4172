"""Memory of this process: as the kernel counts it, and what is given back to it."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any


def memory_bytes() -> dict[str, int]:
    """peak_rss_bytes, rss_bytes and their split rss_anon_bytes (allocations) and rss_file_bytes (mapped files).

    Linux only; elsewhere just the peak, from getrusage.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        names = {
            "VmHWM": "peak_rss_bytes",
            "VmRSS": "rss_bytes",
            "RssAnon": "rss_anon_bytes",
            "RssFile": "rss_file_bytes",
        }
        lines = (line.partition(":") for line in status.read_text().splitlines())
        return {names[key]: int(value.split()[0]) * 1024 for key, _, value in lines if key in names}
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024}


def huge_page_bytes() -> int:
    """Of this process's allocations what lies in huge pages; 0 where the system is not Linux or does not say."""
    rollup = Path("/proc/self/smaps_rollup")
    try:
        found = re.search(r"^AnonHugePages:\s+(\d+) kB", rollup.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def give_back_freed_memory() -> None:
    """Return freed memory to the system; glibc keeps it for later, and no other libc needs to be asked."""
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
