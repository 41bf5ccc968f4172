"""Huge pages under what a model's loading allocates."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from efficientllm.runtime.base.child import run_python
from efficientllm.runtime.engines import memory
from efficientllm.runtime.engines.engine import EngineOptions, load_engine

MEGABYTES = 64
MAPS = """\
55f0c0a00000-55f0c0c00000 r-xp 00000000 fe:00 131 /usr/bin/python3
55f0c1e00000-55f0c2e00000 rw-p 00000000 00:00 0                          [heap]
7f2a00000000-7f2a04000000 rw-p 00000000 00:00 0 
7f2a10000000-7f2a14000000 ---p 00000000 00:00 0 
7f2a20000000-7f2a24000000 rw-p 00200000 fe:00 77                         /models/model.gguf
7f2a30000000-7f2a34000000 rw-p 00000000 00:00 0                          [anon:glibc: malloc]
7ffe12000000-7ffe12800000 rw-p 00000000 00:00 0                          [stack]
"""


def kernel_collapses() -> bool:
    """Whether this kernel grants what is tested, asked without our code."""
    if not memory.HUGE_PAGE_SIZE_PATH.is_file():
        return False
    size = 2 * int(memory.HUGE_PAGE_SIZE_PATH.read_text())
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping.write(bytes(size))
        try:
            mapping.madvise(memory.MADV_COLLAPSE)
        except OSError:
            return False
    return True


needs_kernel = pytest.mark.skipif(not kernel_collapses(), reason="needs Linux 6.1 with transparent huge pages")


def huge_bytes_within(values: np.ndarray) -> int:
    """Bytes in huge pages of the mappings that overlap an array."""
    start, end = values.ctypes.data, values.ctypes.data + values.nbytes
    total, overlaps = 0, False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            overlaps = int(found[1], 16) < end and int(found[2], 16) > start
        elif overlaps and line.startswith("AnonHugePages:"):
            total += 1024 * int(line.split()[1])
    return total


def fresh_memory() -> np.ndarray:
    """int64 [n] of new, untouched pages; malloc would reuse what other tests freed."""
    mapping = mmap.mmap(-1, MEGABYTES * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(mapping, dtype=np.int64)


def ranges_within(values: np.ndarray) -> set[int]:
    start = values.ctypes.data
    return {address for address in memory.resident_ranges() if start <= address < start + values.nbytes}


@needs_kernel
def test_resident_memory_moves_into_huge_pages_and_keeps_its_contents() -> None:
    values = fresh_memory()
    values[:] = np.arange(len(values))
    own = ranges_within(values)
    assert len(own) >= MEGABYTES * 2**20 // int(memory.HUGE_PAGE_SIZE_PATH.read_text()) - 2
    assert memory.collapse(own) >= 0.9 * values.nbytes
    assert huge_bytes_within(values) >= 0.9 * values.nbytes
    assert (values == np.arange(len(values))).all()


@needs_kernel
def test_untouched_memory_stays_out() -> None:
    assert not ranges_within(fresh_memory())


@needs_kernel
def test_allocations_of_a_block_move_into_huge_pages() -> None:
    with memory.huge_pages(wanted=True):
        values = fresh_memory()
        values[:] = 1
    assert huge_bytes_within(values) >= 0.9 * values.nbytes


MAPPED_BLOCKS = """
import ctypes, sys
from efficientllm.runtime.engines.memory import huge_pages

class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks a b c d e f".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype = MallInfo, ctypes.c_void_p
if sys.argv[1] == "own threshold":
    libc.mallopt(-3, 131072)
with huge_pages(wanted=True):
    before = libc.mallinfo2().hblks
    libc.malloc(ctypes.c_size_t(2**20))
    print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(not memory._huge_page_size(), reason="needs transparent huge pages")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.parametrize(("threshold", "mapped"), [("glibc's", 0), ("own threshold", 1)])
def test_malloc_lays_blocks_side_by_side_unless_the_program_decided_otherwise(threshold: str, mapped: int) -> None:
    """In a process of its own: how many blocks of 1 MiB malloc maps by themselves."""
    done = run_python("-c", MAPPED_BLOCKS, threshold)
    assert done.output.strip() == str(mapped), done.errors


THREADS_BLOCKS = """
import ctypes, threading
from efficientllm.runtime.engines.memory import use_one_heap

libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
use_one_heap()
threads = [threading.Thread(target=libc.malloc, args=(1000,)) for _ in range(4)]
[thread.start() for thread in threads]
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="needs glibc")
@pytest.mark.parametrize(("arenas", "has_one"), [("", True), ("8", False)])
def test_threads_share_one_heap_unless_the_environment_decided_otherwise(
    arenas: str, has_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", arenas) if arenas else monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    assert (run_python("-c", THREADS_BLOCKS).output.count("<heap nr=") == 1) == has_one


def test_only_memory_without_a_file_counts() -> None:
    found = [end - start for start, end in memory._anonymous_ranges(MAPS)]
    assert found == [16 * 2**20, 64 * 2**20, 64 * 2**20]


def test_a_system_without_them_loads_all_the_same(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "HUGE_PAGE_SIZE_PATH", tmp_path / "absent")
    assert memory.resident_ranges() == set()
    assert memory.collapse(set()) == 0
    engine = load_engine(artefact, EngineOptions(threads=1, context=32))
    assert np.isfinite(engine.prefill([1, 2])).all()
    engine.close()
