"""Workers, their environment and the order of tests."""

from __future__ import annotations

import os
import tempfile

import pytest

pytest_plugins = ["figures", "skips"]

MAX_WORKERS = 4
"""A worker takes up to 3 GB in the tests that lower a model for ExecuTorch."""


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_xdist_auto_num_workers() -> int:
    """Return what `-n auto` means: one worker more than cores, because tests also wait for servers and processes."""
    return min(available_cores() + 1, MAX_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    workers = getattr(config.option, "numprocesses", None)
    # the process that only hands tests out needs no fixtures, whose libraries load for seconds
    if hasattr(config, "workerinput") or not workers:
        config.pluginmanager.import_plugin("shared_fixtures")
    if "EFFICIENTLLM_CACHE" not in os.environ:  # what tests find out about their files is theirs; children inherit it
        cache = tempfile.TemporaryDirectory(prefix="efficientllm-tests-")
        config.add_cleanup(cache.cleanup)
        os.environ["EFFICIENTLLM_CACHE"] = cache.name
    if workers:
        # workers and their children inherit it: threads of two processes on one core wait for each other, without
        # spinning
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // workers)))
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first where there are workers, so that none is left with one when the others are done.

    The scheduler reads the group of a test in its name, which pytest-xdist 3.8 writes where pytest 9.2 does not look.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
        for item in items:
            group = item.get_closest_marker("xdist_group")
            if group and hasattr(item, "_id"):
                item._id = type(item._id).parse(f"{item.nodeid}@{group.args[0]}")
