"""Memory of this process: as the kernel counts it, and what is given back to it.

Huge pages under an engine's buffers: every decoded token reads all weights, and small pages cost TLB misses.

Linux 6.1 or newer (MADV_COLLAPSE, madvise(2)); elsewhere there is nothing to collapse. The engines allocate inside
their own libraries, so what loading a model added is found in /proc/self/maps.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import sys
import time
from collections.abc import Iterator
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


SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
"""Bytes of a huge page, where the kernel has them."""

MADV_COLLAPSE = 25
"""Copy a range into huge pages now, whatever the system's setting for new pages."""

RESIDENT_SHARE = 0.75
"""Least share of a huge page that must be in memory already: the rest becomes resident with it."""

LARGEST_TOGETHER = 32 * 2**20
"""The largest threshold that glibc takes, in bytes."""

LONGEST_SECONDS = 2.0
"""Where memory is too fragmented, the kernel searches long for every huge page."""


@contextlib.contextmanager
def huge_pages(wanted: bool) -> Iterator[None]:
    """Move what the block allocates, and does not free, into huge pages at its end.

    From its beginning on, glibc's malloc serves blocks of up to 32 MiB from its heap in the whole process, unless the
    program set a threshold of its own (see `_allocate_together`).
    """
    if not wanted or not _huge_page_bytes():
        yield
        return
    _allocate_together()
    give_back_freed_memory()  # else the model could be laid into what is resident already
    before = resident_ranges()
    yield
    give_back_freed_memory()
    collapse(resident_ranges() - before)


def resident_ranges() -> set[int]:
    """Addresses of the huge pages' worth of this process's own memory that is resident, in huge pages or small ones."""
    size = _huge_page_bytes()
    if not size:
        return set()
    libc: Any = ctypes.CDLL(None)
    vector = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    found = set()
    for start, end in _anonymous_ranges(maps):
        for address in range(-(-start // size) * size, end - size + 1, size):
            # it fails for what was freed meanwhile
            if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector) == 0:
                resident = sum(byte & 1 for byte in vector)
                if resident >= RESIDENT_SHARE * len(vector):
                    found.add(address)
    return found


def collapse(addresses: set[int]) -> int:
    """Back `addresses` of `resident_ranges` with huge pages; bytes that are so now."""
    if not addresses:
        return 0
    size, covered = _huge_page_bytes(), 0
    libc: Any = ctypes.CDLL(None)
    began = time.perf_counter()
    for address in sorted(addresses):
        if time.perf_counter() - began > LONGEST_SECONDS:
            break
        covered += size * (libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_COLLAPSE) == 0)
    return covered


def _allocate_together() -> None:
    """Let glibc's malloc put a layer's matrices side by side instead of mapping each by itself; no other libc has it.

    5 % of onnxruntime's decode speed, whose packed matrices are smaller than a huge page. glibc maps blocks larger than
    a threshold, and a mapped block that is freed raises the threshold to its size, for good (mallopt(3)): one block of
    almost 32 MiB, never touched, brings the process where any program arrives that frees such an array.

    Not by mallopt: it would overrule a threshold that the program or its user set, and from its first call on glibc
    adapts nothing any more. Going back to the default, 128 KiB, would then map the logits of every token anew: 160 us
    instead of 7 for the copy of 49,152 of them.
    """
    libc: Any = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(libc.malloc(LARGEST_TOGETHER - 2 * mmap.PAGESIZE))  # its header, and the flags in its size, count too


def _huge_page_bytes() -> int:
    try:
        return int(SIZE_FILE.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _anonymous_ranges(maps: str) -> Iterator[tuple[int, int]]:
    """Private, writable memory that no file backs, from the text of /proc/self/maps."""
    for line in maps.splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw.p \S+ \S+ 0\s*(.*)", line)
        if found and not found[3].startswith("[stack"):
            yield int(found[1], 16), int(found[2], 16)
