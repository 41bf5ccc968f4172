"""Temperature, clock and energy of a Linux or Android device.

All readings use a `Shell`, so that the same code reads this machine and, over adb, a phone.
"""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ..runtime.base import child

SAMPLE_SECONDS = 0.5
"""Seconds between two readings of the power, on devices without an energy counter."""
BATTERY = "/sys/class/power_supply/battery"
"""Folder of the battery's files on Android."""
ZONES = "/sys/class/thermal/thermal_zone*/temp"
CLOCKS = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"


class Shell(Protocol):
    """Read access to a device."""

    def read(self, pattern: str) -> list[str]:
        """Return the contents of the readable files that match an absolute glob pattern, sorted by name."""
        ...

    def run(self, command: Sequence[str]) -> str | None:
        """Return the standard output, and None if the command is missing or fails."""
        ...


class LocalShell:
    """A shell of this machine. Tests pass another `root` than /."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def read(self, pattern: str) -> list[str]:
        contents = []
        for path in sorted(self._root.glob(pattern.lstrip("/"))):
            try:
                contents.append(path.read_text(encoding="utf-8", errors="replace").strip("\0\n "))
            except OSError:  # on many systems only root may read RAPL counters
                continue
        return contents

    def run(self, command: Sequence[str]) -> str | None:
        try:
            finished = child.run(command, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return finished.output if finished.code == 0 else None


def _numbers(texts: Sequence[str]) -> list[float]:
    return [float(text) for text in texts if re.fullmatch(r"-?\d+(\.\d+)?", text)]


def pair_of(before: float | None, after: float | None) -> tuple[float, float] | None:
    """Return the readings before and after, and None if either is missing."""
    return None if before is None or after is None else (before, after)


def temperature_celsius(shell: Shell) -> float | None:
    """Return the temperature of the hottest plausible thermal zone. The unit of sysfs is millidegrees."""
    degrees = [value / 1000 for value in _numbers(shell.read(ZONES))]
    plausible = [value for value in degrees if 0 < value < 150]
    return max(plausible, default=None)


def battery_celsius(shell: Shell) -> float | None:
    """Return the temperature of an Android battery. The unit of sysfs is tenths of a degree."""
    values = _numbers(shell.read(f"{BATTERY}/temp"))
    return values[0] / 10 if values else None


def clock_mhz(shell: Shell, cores: int = 0) -> float | None:
    """Return the mean clock of the `cores` fastest cores, which are those that work. 0 means all cores."""
    clocks = [value / 1000 for value in _numbers(shell.read(CLOCKS))]
    if not clocks:
        cpuinfo = "\n".join(shell.read("/proc/cpuinfo"))
        clocks = _numbers(re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", cpuinfo, re.MULTILINE))
    fastest = sorted(clocks, reverse=True)[: cores or None]
    return sum(fastest) / len(fastest) if fastest else None


def rapl_joules(shell: Shell) -> list[tuple[float, float]]:
    """Return (counter, range) in joules of each processor package."""
    counters = _numbers(shell.read("/sys/class/powercap/intel-rapl:[0-9]/energy_uj"))
    ranges = _numbers(shell.read("/sys/class/powercap/intel-rapl:[0-9]/max_energy_range_uj"))
    if len(counters) != len(ranges):
        return []
    return [(counter / 1e6, size / 1e6) for counter, size in zip(counters, ranges, strict=True)]


def pmic_watts(text: str) -> float | None:
    """Return the power of a Raspberry Pi 5 from `vcgencmd pmic_read_adc`: current times voltage, summed over rails."""
    rails: dict[str, dict[str, float]] = {}
    for name, kind, value in re.findall(r"(\w+)_([AV])\s+(?:current|volt)\(\d+\)=([\d.]+)", text):
        rails.setdefault(name, {})[kind] = float(value)
    powers = [rail["A"] * rail["V"] for rail in rails.values() if len(rail) == 2]
    return sum(powers) if powers else None


def battery_watts(shell: Shell) -> float | None:
    """Return the power drawn from an Android battery, and None while it charges or without a meter.

    The units of sysfs are microamperes and microvolts.
    """
    status = shell.read(f"{BATTERY}/status")
    current = _numbers(shell.read(f"{BATTERY}/current_now"))
    voltage = _numbers(shell.read(f"{BATTERY}/voltage_now"))
    if not current or not voltage or status != ["Discharging"]:
        return None
    return abs(current[0]) * voltage[0] / 1e12


def power_watts(shell: Shell) -> float | None:
    """Return the current power from a meter without a counter, and None without one."""
    text = shell.run(["vcgencmd", "pmic_read_adc"])
    return (pmic_watts(text) if text else None) or battery_watts(shell)


class Energy:
    """Energy of a block. `joules` is None without a meter, or if the block ended before the first reading."""

    joules: float | None = None


@contextmanager
def energy_meter(shell: Shell, seconds: Callable[[], float]) -> Iterator[Energy]:
    """Measure the energy of a block with RAPL's counters, else by sampling the power.

    `seconds` is a monotonic clock.
    """
    energy = Energy()
    before = rapl_joules(shell)
    if before:
        yield energy
        after = rapl_joules(shell)
        energy.joules = 0.0
        for (start, size), (end, _) in zip(before, after, strict=True):
            energy.joules += (end - start) % size  # the modulo handles a counter that wrapped
        return
    if power_watts(shell) is None:
        yield energy
        return
    # The power before the block is not a sample of it.
    watts: list[float] = []
    stop, start = threading.Event(), seconds()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            value = power_watts(shell)
            if value is not None:
                watts.append(value)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield energy
    finally:
        stop.set()
        thread.join()
    energy.joules = sum(watts) / len(watts) * (seconds() - start) if watts else None
