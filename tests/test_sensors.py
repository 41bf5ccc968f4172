"""Temperature, clock and energy, read from a made-up /sys and over a remote shell."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from efficientllm.devices import sensors
from efficientllm.devices.remote import MARK, RemoteShell
from efficientllm.runtime.base.child import ProcessResult

PMIC = """\
       3V7_WL_SW_A current(0)=0.10000000A
         VDD_CORE_A current(7)=2.50000000A
        3V7_WL_SW_V volt(8)=3.70000000V
         VDD_CORE_V volt(15)=0.80000000V
            EXT5V_V volt(24)=5.10000000V
"""


def write(root: Path, path: str, text: str) -> None:
    target = root / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def test_temperature_is_the_hottest_plausible_zone(tmp_path: Path) -> None:
    shell = sensors.LocalShell(tmp_path)
    assert sensors.temperature_celsius(shell) is None
    for zone, text in enumerate(("41500\n", "62000\n", "-273000\n", "N/A\n", "999000\n")):
        write(tmp_path, f"/sys/class/thermal/thermal_zone{zone}/temp", text)
    assert sensors.temperature_celsius(shell) == 62.0
    write(tmp_path, "/sys/class/power_supply/battery/temp", "315\n")
    assert sensors.battery_celsius(shell) == 31.5


def test_clock_is_the_mean_over_cores(tmp_path: Path) -> None:
    shell = sensors.LocalShell(tmp_path)
    assert sensors.clock_mhz(shell) is None
    write(tmp_path, "/proc/cpuinfo", "model name : x\ncpu MHz\t\t: 2000.5\n\ncpu MHz\t\t: 3000.5\n")
    assert sensors.clock_mhz(shell) == 2500.5
    for core, kilohertz in enumerate((1_800_000, 2_400_000)):
        write(tmp_path, f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", f"{kilohertz}\n")
    assert sensors.clock_mhz(shell) == 2100.0
    assert sensors.clock_mhz(shell, cores=1) == 2400.0


def test_energy_from_counters_that_wrap(tmp_path: Path) -> None:
    counter = "/sys/class/powercap/intel-rapl:0/energy_uj"
    write(tmp_path, counter, "999000000\n")
    write(tmp_path, "/sys/class/powercap/intel-rapl:0/max_energy_range_uj", "1000000000\n")
    with sensors.energy_meter(sensors.LocalShell(tmp_path), lambda: 0.0) as energy:
        write(tmp_path, counter, "4000000\n")
    assert energy.joules == pytest.approx(5.0)


def test_energy_from_sampled_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.8 W before the block, 3.2 W in it, which is said to last 5 s."""
    monkeypatch.setattr(sensors, "SAMPLE_SECONDS", 0.05)
    assert sensors.pmic_watts(PMIC) == pytest.approx(0.1 * 3.7 + 2.5 * 0.8)
    assert sensors.pmic_watts("vc: command not registered") is None
    for name, text in (("status", "Discharging"), ("current_now", "-200000"), ("voltage_now", "4000000")):
        write(tmp_path, f"/sys/class/power_supply/battery/{name}", f"{text}\n")
    shell = sensors.LocalShell(tmp_path)
    assert sensors.battery_watts(shell) == pytest.approx(0.8)
    times = iter((10.0, 15.0))
    with sensors.energy_meter(shell, lambda: next(times)) as energy:
        write(tmp_path, "/sys/class/power_supply/battery/current_now", "-800000\n")
        time.sleep(0.2)
    assert energy.joules == pytest.approx(16.0)
    monkeypatch.setattr(sensors, "SAMPLE_SECONDS", 60.0)
    with sensors.energy_meter(shell, lambda: 0.0) as energy:
        pass
    assert energy.joules is None  # over before its first reading
    write(tmp_path, "/sys/class/power_supply/battery/status", "Charging\n")
    with sensors.energy_meter(shell, lambda: 0.0) as energy:
        pass
    assert energy.joules is None


def test_a_remote_shell_reads_the_same() -> None:
    asked: list[str] = []

    def run(line: str) -> ProcessResult:
        asked.append(line)
        return ProcessResult(0, f"41500\n{MARK}\r\n62000\n{MARK}\n", "")

    assert sensors.temperature_celsius(RemoteShell(run)) == 62.0
    assert "/sys/class/thermal/thermal_zone*/temp" in asked[0]
