"""Huge pages under what a model's loading allocates."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from efficientllm.runtime import huge_pages
from efficientllm.runtime.engine import EngineOptions, load

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
    if not huge_pages.SIZE_FILE.is_file():
        return False
    size = 2 * int(huge_pages.SIZE_FILE.read_text())
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(bytes(size))
        try:
            memory.madvise(huge_pages.MADV_COLLAPSE)
        except OSError:
            return False
    return True


needs_kernel = pytest.mark.skipif(not kernel_collapses(), reason="needs Linux 6.1 with transparent huge pages")


def anonymous_huge_bytes() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.findall(r"AnonHugePages:\s+(\d+)", text)[0])


@needs_kernel
def test_resident_memory_moves_into_huge_pages_and_keeps_its_contents() -> None:
    before = huge_pages.resident_ranges()
    values = np.arange(MEGABYTES * 2**20 // 8)
    added = huge_pages.resident_ranges() - before
    start = values.ctypes.data
    own = {address for address in added if start <= address < start + values.nbytes}
    assert len(own) >= MEGABYTES * 2**20 // int(huge_pages.SIZE_FILE.read_text()) - 2
    assert huge_pages.collapse(own) >= 0.9 * values.nbytes
    assert anonymous_huge_bytes() >= 0.9 * values.nbytes
    assert (values == np.arange(len(values))).all()


@needs_kernel
def test_untouched_memory_stays_out() -> None:
    before = huge_pages.resident_ranges()
    untouched = np.empty(MEGABYTES * 2**20, dtype=np.uint8)
    start = untouched.ctypes.data
    added = huge_pages.resident_ranges() - before
    assert not {address for address in added if start <= address < start + untouched.nbytes}


def test_only_memory_without_a_file_counts() -> None:
    found = [end - start for start, end in huge_pages._anonymous_ranges(MAPS)]
    assert found == [16 * 2**20, 64 * 2**20, 64 * 2**20]


def test_a_system_without_them_loads_all_the_same(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "SIZE_FILE", tmp_path / "absent")
    assert huge_pages.resident_ranges() == set()
    assert huge_pages.collapse(set()) == 0
    engine = load(artefact, EngineOptions(threads=1, context=32))
    assert np.isfinite(engine.prefill([1, 2])).all()
    engine.close()
