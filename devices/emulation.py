"""Detection of emulators that translate instructions, so that no figure here is the device's.

Sources: QEMU's linux-user/syscall.c, whose is_proc_myself hides the emulator behind /proc/self/exe only;
/proc/sys/kernel/arch (Linux 6.1); Apple's sysctl.proc_translated; AOSP's hardware names.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .sensors import Shell

EXECUTABLE_LINK = "/proc/self/task/../exe"
"""Link to the executable that Linux runs. Under emulation it names the emulator, unlike /proc/self/exe."""
EMULATORS = {"qemu-": "qemu-user", "rosetta": "Rosetta", "box64": "box64", "FEX": "FEX"}
"""Maps the prefix of an executable's name to the emulator's."""
INSTRUCTION_SETS = {"x86": re.compile(r"x86|amd64|i\d86"), "arm": re.compile(r"aarch64|arm")}
SIGNS = {"VirtualApple": "Rosetta", "QEMU TCG": "QEMU without hardware virtualisation"}
"""Maps a name of the processor in /proc/cpuinfo to the emulator that gives it."""
ANDROID_HARDWARE = ("goldfish", "ranchu", "cutf", "cutf_cvm", "vbox86", "redroid", "waydroid")
"""Values of ro.hardware on systems that are no phone."""


def instruction_set(machine: str) -> str:
    """Return "x86" or "arm", of 32 or 64 bits, for a machine name of uname or Android, and "" for others."""
    return next((name for name, pattern in INSTRUCTION_SETS.items() if pattern.match(machine.lower())), "")


def detect_emulator(shell: Shell, machine: str, executable: str = "") -> str:
    """Return the emulator below a program that is built for `machine`, and "" if none was found.

    `executable` is the target of EXECUTABLE_LINK for that program, or "" if it is unknown.
    """
    name = executable.rpartition("/")[2]
    for prefix, emulator in EMULATORS.items():
        if name.startswith(prefix):
            return emulator
    kernel = (shell.read("/proc/sys/kernel/arch") or [shell.run(["uname", "-m"]) or ""])[0].strip()
    built_for, runs_on = instruction_set(machine), instruction_set(kernel)
    if built_for and runs_on and built_for != runs_on:
        return f"programs for {machine} on a kernel for {kernel}"
    if shell.run(["sysctl", "-n", "sysctl.proc_translated"]) == "1\n":
        return "Rosetta"
    cpuinfo = "\n".join(shell.read("/proc/cpuinfo"))
    return next((emulator for sign, emulator in SIGNS.items() if sign in cpuinfo), "")


def detect_android_emulator(shell: Shell, abi: str, prop: Callable[[str], str]) -> str:
    """Return what an Android system runs in, if it is no phone. Its programs are for `abi`, `prop` calls getprop."""
    names = [prop(name) for name in ("ro.hardware", "ro.boot.hardware")]
    found = next((name for name in names if name in ANDROID_HARDWARE), "")
    if found or "1" in (prop("ro.boot.qemu"), prop("ro.kernel.qemu")):
        return f"Android without a phone ({found or 'qemu'})"
    return detect_emulator(shell, abi)
