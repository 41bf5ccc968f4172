"""Disks that are small, and folders that are mounted, where a test may mount; a skip says why not where it may not."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

AS_ROOT = [] if hasattr(os, "geteuid") and os.geteuid() == 0 else ["sudo", "--non-interactive"]


def _as_root(*command: str) -> bool:
    """Whether it worked."""
    try:
        return subprocess.run([*AS_ROOT, *command], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """`folder`, made and mounted as a disk of its own."""
    folder.mkdir(exist_ok=True)
    options = f"size={kilobytes}k,mode=0777"
    if sys.platform != "linux" or not _as_root("mount", "-t", "tmpfs", "-o", options, "none", str(folder)):
        pytest.skip("a disk of its own cannot be mounted here (needs Linux, and root or sudo)")
    try:
        yield folder
    finally:
        assert _as_root("umount", "--lazy", str(folder))  # mapped weights keep it busy


def grow(folder: Path, kilobytes: int) -> None:
    """Give a small disk more room."""
    assert _as_root("mount", "-o", f"remount,size={kilobytes}k", str(folder))


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """`folder` mounted over itself so that root, too, cannot write it; what is mounted in it meanwhile goes first."""
    if sys.platform != "linux" or not _as_root("mount", "--bind", str(folder), str(folder)):
        pytest.skip("a folder cannot be mounted read-only here (needs Linux, and root or sudo)")
    try:
        assert _as_root("mount", "-o", "remount,bind,ro", str(folder))
        yield
    finally:
        assert _as_root("umount", "--lazy", str(folder))
