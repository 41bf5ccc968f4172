"""A made-up phone's /sys, and a program that changes it while it runs."""

from __future__ import annotations

import json
from pathlib import Path

REST = "-200000 600000"
"""0.8 W, fast cores at 600 MHz."""
SET_PHONE = """
put() { echo "$1" > "$2.new" && mv "$2.new" "$2"; }
set_phone() {  # microamperes at 4 V, kHz of the two fast cores
  put "$1" $SYS/class/power_supply/battery/current_now
  for core in 4 5; do put "$2" $SYS/devices/system/cpu/cpu$core/cpufreq/scaling_cur_freq; done
}
"""


def sysfs(root: Path, status: str = "Discharging") -> Path:
    """A phone at rest, its two slow cores at 300 MHz."""
    files = {
        "class/power_supply/battery/status": status,
        "class/power_supply/battery/current_now": "-200000",
        "class/power_supply/battery/voltage_now": "4000000",
        "class/power_supply/battery/temp": "315",
        "class/thermal/thermal_zone0/temp": "99000",
    }
    cores = {0: "300000", 1: "300000", 4: "600000", 5: "600000"}
    files |= {f"devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq": clock for core, clock in cores.items()}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def entry(prompt: int, decode: int, speed: float) -> dict[str, object]:
    """A test of two repetitions on two threads in llama-bench's JSON."""
    return {
        "n_prompt": prompt,
        "n_gen": decode,
        "n_depth": 0,
        "n_threads": 2,
        "build_commit": "c0ffee",
        "samples_ts": [speed, speed],
    }


def program(path: Path, steps: str, entries: list[dict[str, object]]) -> Path:
    """Write a script that takes `steps` on the phone at $SYS, prints and leaves it at rest, with builtins at once."""
    path.write_text(
        f"{SET_PHONE}{steps}\ncat <<'END'\n{json.dumps(entries)}\nEND\nput() {{ echo $1 > $2; }}\nset_phone {REST}\n"
    )
    return path
