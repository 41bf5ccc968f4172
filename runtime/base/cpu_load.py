"""Tell how busy this machine is: by the system's load, and by the cores that other programs use (/proc/stat)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Container
from pathlib import Path

STAT = Path("/proc/stat")

INTERVAL = 0.2
"""Least seconds of a measurement. The kernel counts in hundredths of a second."""

BUSY_LOAD = 2.0
"""Processes a core that want to run, above which nothing is timed. At 6, attention took over ten minutes."""


def is_busy() -> bool:
    """Tell whether more than BUSY_LOAD processes a core wanted to run in the last minute (Unix only)."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY_LOAD * (os.cpu_count() or 1)


def busy_cores(before: str, after: str, cores: Container[int]) -> float:
    """Return how many of `cores` were busy on average between two contents of /proc/stat."""
    busy = 0.0
    for one, other in zip(before.splitlines(), after.splitlines(), strict=False):
        name, *ticks = one.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            spent = [int(new) - int(old) for old, new in zip(ticks, other.split()[1:], strict=True)]
            total = sum(spent[:8])  # the last two are parts of the first two
            busy += 1 - (spent[3] + spent[4]) / total if total else 0.0
    return busy


class FreeCores:
    """The number of threads for which other programs leave cores.

    Threads of llama.cpp wait for each other after every operation, and they spin. If one of them has no core, all of
    them wait for the scheduler.
    """

    def __init__(self, most: int) -> None:
        """Begin to measure. The first `update` ends the measurement, so create it as early as possible."""
        self._most = most
        self.count = 0
        """Threads that have a core each, 1 to `most`. 0 before the first `update`."""
        self.others = 0.0
        """Cores that other programs use."""
        self.cores = os.sched_getaffinity(0)
        self._sample()

    @classmethod
    def where_known(cls, most: int) -> FreeCores | None:
        """Return the free cores on Linux, None on other systems."""
        return cls(most) if STAT.is_file() else None

    def update(self) -> int:
        """Return the count, measured again if INTERVAL has passed. The first call waits for the end of INTERVAL."""
        seconds = time.monotonic() - self._time
        if seconds < INTERVAL and self.count:
            return self.count
        if seconds < INTERVAL:
            time.sleep(INTERVAL - seconds)
            seconds = time.monotonic() - self._time
        before, own = self._stat, self._own_seconds
        self._sample()
        # however long ago `before` is: on shared cores, one pass may take many seconds
        self.others = busy_cores(before, self._stat, self.cores) - (self._own_seconds - own) / seconds
        free = math.floor(len(self.cores) - self.others + 0.5)
        self.count = max(1, min(self._most, free))
        return self.count

    def _sample(self) -> None:
        self._time, self._own_seconds, self._stat = time.monotonic(), time.process_time(), STAT.read_text()
