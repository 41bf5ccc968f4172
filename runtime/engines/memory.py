"""Memory of this process: its size, heap trimming, and huge pages under an engine's buffers.

Every decoded token reads all weights, and small pages cost TLB misses. Huge pages need Linux 6.1 or newer
(MADV_COLLAPSE, madvise(2)). Elsewhere nothing is collapsed. The engines allocate inside their own libraries, so the
memory that loading added is found in /proc/self/maps.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HUGE_PAGE_SIZE_PATH = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
"""File with the bytes of a huge page, on kernels that have them."""

MADV_COLLAPSE = 25
"""madvise(2) argument that copies a range into huge pages now, whatever the system's setting for new pages."""

MIN_RESIDENT_SHARE = 0.75
"""Least share of a huge page that must be resident already, because the rest becomes resident with it."""

MAX_MMAP_THRESHOLD = 32 * 2**20
"""Largest threshold, in bytes, above which glibc maps a block by itself."""

MAX_COLLAPSE_SECONDS = 2.0
"""Time limit. In fragmented memory the kernel searches long for every huge page."""


def memory_bytes() -> dict[str, int]:
    """Return peak_rss_bytes, rss_bytes, and its part rss_anon_bytes (allocations, not mapped files).

    Outside Linux only the peak is known, from getrusage.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        names = {"VmHWM": "peak_rss_bytes", "VmRSS": "rss_bytes", "RssAnon": "rss_anon_bytes"}
        lines = (line.partition(":") for line in status.read_text().splitlines())
        return {names[key]: int(value.split()[0]) * 1024 for key, _, value in lines if key in names}
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024}


def trim_heap() -> None:
    """Give freed memory back to the system, with glibc, which otherwise keeps it for later allocations."""
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def use_one_heap() -> None:
    """Let glibc's threads share one heap, where each reuses what others freed, unless the environment decides."""
    set_option: Any = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None and not {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"} & os.environ.keys():
        set_option(-8, 1)  # M_ARENA_MAX of mallopt(3)


@contextlib.contextmanager
def huge_pages(wanted: bool) -> Iterator[None]:
    """Move the memory that the block allocates and does not free into huge pages when the block ends.

    From its start on, glibc's malloc serves blocks of up to 32 MiB from its heap in the whole process, unless the
    program set a threshold of its own (see `_raise_mmap_threshold`).
    """
    if not wanted or not _huge_page_size():
        yield
        return
    _raise_mmap_threshold()
    trim_heap()  # otherwise the model could be loaded into memory that is resident already, which is not collapsed
    before = resident_ranges()
    yield
    trim_heap()
    collapse(resident_ranges() - before)


def resident_ranges() -> set[int]:
    """Return the addresses of this process's own resident memory in steps of a huge page, whatever its page size."""
    size = _huge_page_size()
    if not size:
        return set()
    libc: Any = ctypes.CDLL(None)
    num_pages = size // mmap.PAGESIZE
    vector = (ctypes.c_ubyte * num_pages)()
    residence_bits = int.from_bytes(b"\1" * num_pages)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    found = set()
    for start, end in _anonymous_ranges(maps):
        for address in range(-(-start // size) * size, end - size + 1, size):
            # mincore fails for a range that was freed since the file was read.
            if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector) == 0:
                num_resident = (int.from_bytes(vector) & residence_bits).bit_count()
                if num_resident >= MIN_RESIDENT_SHARE * num_pages:
                    found.add(address)
    return found


def collapse(addresses: set[int]) -> int:
    """Move the ranges at `addresses`, of `resident_ranges`, into huge pages. Return the bytes that were moved."""
    if not addresses:
        return 0
    size, covered = _huge_page_size(), 0
    libc: Any = ctypes.CDLL(None)
    began = time.perf_counter()
    for address in sorted(addresses):
        if time.perf_counter() - began > MAX_COLLAPSE_SECONDS:
            break
        if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_COLLAPSE) == 0:
            covered += size
    return covered


def _raise_mmap_threshold() -> None:
    """Let glibc's malloc place a layer's matrices next to each other instead of mapping each by itself.

    This gains 5 % of onnxruntime's decode speed, because its packed matrices are smaller than a huge page.
    """
    # glibc maps blocks larger than a threshold. A mapped block that is freed raises the threshold to its size for good
    # (mallopt(3)). So one block of almost 32 MiB is allocated and freed, untouched, as any program does that frees a
    # large array.
    # mallopt would override a threshold that the program or its user set, and it ends glibc's adaptation. With the
    # default of 128 KiB the logits of every token would be mapped anew: a copy of 49,152 takes 160 us instead of 7.
    libc: Any = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    # The header of the block and the flags in its size count as well, so it stays two pages below the limit.
    libc.free(libc.malloc(MAX_MMAP_THRESHOLD - 2 * mmap.PAGESIZE))


def _huge_page_size() -> int:
    """Return the bytes of a huge page, 0 on systems without them."""
    try:
        return int(HUGE_PAGE_SIZE_PATH.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _anonymous_ranges(maps: str) -> Iterator[tuple[int, int]]:
    """Yield the address ranges of private, writable memory without a file, from the text of /proc/self/maps."""
    for line in maps.splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw.p \S+ \S+ 0\s*(.*)", line)
        if found and not found[3].startswith("[stack"):
            yield int(found[1], 16), int(found[2], 16)
