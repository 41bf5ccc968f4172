"""What lies between a program and the hardware: an emulator, whose figures are no device's, or a virtual machine.

Sources: QEMU's linux-user/syscall.c (is_proc_myself hides the emulator behind /proc/self/exe, and nowhere else),
/proc/sys/kernel/arch (Linux 6.1), Apple's sysctl.proc_translated and kern.hv_vmm_present, AOSP's names of hardware.

Known boards and phones: what the maker says about them, to annotate results.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .sensors import Shell

RUNNING_PROGRAM = "/proc/self/task/../exe"
"""Link to what Linux runs for a process: the emulator, where /proc/self/exe leads a process to its own file."""
TRANSLATORS = {
    "qemu-": "qemu-user",
    "rosetta": "Rosetta",
    "box64": "box64",
    "box86": "box86",
    "FEX": "FEX",
    "blink": "blink",
}
"""What the name of the program that really runs begins with -> the emulator."""
FAMILIES = {"x86": re.compile(r"x86|amd64|i\d86"), "arm": re.compile(r"aarch64|arm")}
ANDROID_HARDWARE = {
    "goldfish": "the Android emulator",
    "ranchu": "the Android emulator",
    "cutf_cvm": "Cuttlefish",
    "cutf": "Cuttlefish",
    "vbox86": "Genymotion",
    "redroid": "redroid, Android in a container",
    "waydroid": "Waydroid, Android in a container",
}
"""ro.hardware of what is no phone."""
MACHINE_SIGNS = re.compile(r"KVM|QEMU|VMware|VirtualBox|Virtual Machine|Xen|HVM|Bochs|Parallels|BHYVE|Firecracker")
"""In the names that firmware gives a machine."""


@dataclass(frozen=True)
class Layer:
    """What was found, or nothing."""

    name: str = ""
    translates: bool = False
    """Whether instructions are translated, so that no figure is the device's."""


def family(machine: str) -> str:
    """x86 or arm, 32 or 64 bits, of what uname or Android calls a machine; "" of others."""
    return next((name for name, pattern in FAMILIES.items() if pattern.match(machine.lower())), "")


def recognise(shell: Shell, machine: str, program: str = "") -> Layer:
    """What lies between a program built for `machine` and the hardware of the device that `shell` looks at.

    `program` is where RUNNING_PROGRAM leads for it; "" where that is not known.
    """
    name = program.rpartition("/")[2]
    for beginning, emulator in TRANSLATORS.items():
        if name.startswith(beginning):
            return Layer(emulator, True)
    kernel = (shell.read("/proc/sys/kernel/arch") or [shell.run(["uname", "-m"]) or ""])[0].strip()
    if family(kernel) and family(machine) and family(kernel) != family(machine):
        return Layer(f"programs for {machine} on a kernel for {kernel}", True)
    return _of_a_mac(shell) or _of_linux(shell) or Layer()


def _of_a_mac(shell: Shell) -> Layer | None:
    if shell.run(["sysctl", "-n", "sysctl.proc_translated"]) == "1\n":
        return Layer("Rosetta", True)
    if shell.run(["sysctl", "-n", "kern.hv_vmm_present"]) == "1\n":
        return Layer("virtual machine")
    return None


def _of_linux(shell: Shell) -> Layer | None:
    cpuinfo = "\n".join(shell.read("/proc/cpuinfo"))
    if "VirtualApple" in cpuinfo:  # what Rosetta tells a Linux container that the processor is
        return Layer("Rosetta", True)
    if "QEMU TCG" in cpuinfo:
        return Layer("QEMU without hardware virtualisation", True)
    release = "".join(shell.read("/proc/sys/kernel/osrelease"))
    if "microsoft" in release.lower():
        return Layer("WSL 2" if "WSL2" in release else "WSL")
    found = (shell.run(["systemd-detect-virt", "--vm"]) or "").strip()
    x86 = re.search(r"^flags\s*:", cpuinfo, re.MULTILINE)
    if found == "qemu" and x86:  # systemd's name of TCG there; elsewhere it cannot tell TCG from KVM
        return Layer("QEMU without hardware virtualisation", True)
    if found not in ("", "none"):
        return Layer(f"virtual machine ({found})")
    names = " ".join(shell.read("/sys/class/dmi/id/sys_vendor") + shell.read("/sys/class/dmi/id/product_name"))
    names += " ".join(shell.read("/proc/device-tree/compatible"))
    sign = MACHINE_SIGNS.search(names) or re.search("dummy-virt", names)
    if sign or re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE):
        return Layer(f"virtual machine ({sign[0]})" if sign else "virtual machine")
    return None


def recognise_android(shell: Shell, abi: str, prop: Callable[[str], str]) -> Layer:
    """The same of an Android system whose programs are built for `abi`; `prop` asks getprop."""
    for name in ("ro.hardware", "ro.boot.hardware"):
        if prop(name) in ANDROID_HARDWARE:
            return Layer(ANDROID_HARDWARE[prop(name)], True)
    if "1" in (prop("ro.boot.qemu"), prop("ro.kernel.qemu")):
        return Layer("the Android emulator", True)
    return recognise(shell, abi)


@dataclass(frozen=True)
class Board:
    """One device as sold."""

    name: str
    soc: str
    cores: str
    ram: str
    """Sizes it is sold with."""


BOARDS = {
    "Raspberry Pi 5": Board("Raspberry Pi 5", "Broadcom BCM2712", "4x Cortex-A76 2.4 GHz", "2/4/8/16 GB"),
    "Raspberry Pi 500": Board("Raspberry Pi 500", "Broadcom BCM2712", "4x Cortex-A76 2.4 GHz", "8 GB"),
    "Raspberry Pi Compute Module 5": Board(
        "Raspberry Pi Compute Module 5", "Broadcom BCM2712", "4x Cortex-A76 2.4 GHz", "2/4/8/16 GB"
    ),
    "Raspberry Pi 4": Board("Raspberry Pi 4 Model B", "Broadcom BCM2711", "4x Cortex-A72 1.5-1.8 GHz", "1/2/4/8 GB"),
    "Raspberry Pi 400": Board("Raspberry Pi 400", "Broadcom BCM2711", "4x Cortex-A72 1.8 GHz", "4 GB"),
    "Raspberry Pi 3": Board("Raspberry Pi 3", "Broadcom BCM2837", "4x Cortex-A53 1.2-1.4 GHz", "1 GB"),
    "Raspberry Pi Zero 2": Board("Raspberry Pi Zero 2 W", "Broadcom RP3A0", "4x Cortex-A53 1.0 GHz", "512 MB"),
    "Orange Pi 5": Board("Orange Pi 5", "Rockchip RK3588S", "4x Cortex-A76 + 4x Cortex-A55", "4/8/16 GB"),
    "Radxa ROCK 5B": Board("Radxa ROCK 5B", "Rockchip RK3588", "4x Cortex-A76 + 4x Cortex-A55", "4/8/16/32 GB"),
    "NVIDIA Jetson Orin Nano": Board("Jetson Orin Nano", "NVIDIA Orin", "6x Cortex-A78AE", "4/8 GB"),
    "Google Pixel 8": Board("Pixel 8", "Google Tensor G3", "1x X3 + 4x A715 + 4x A510", "8 GB"),
    "Google Pixel 8 Pro": Board("Pixel 8 Pro", "Google Tensor G3", "1x X3 + 4x A715 + 4x A510", "12 GB"),
    "Google Pixel 9": Board("Pixel 9", "Google Tensor G4", "1x X4 + 3x A720 + 4x A520", "12 GB"),
    "Google Pixel 7": Board("Pixel 7", "Google Tensor G2", "2x X1 + 2x A78 + 4x A55", "8 GB"),
    "samsung SM-S921": Board("Galaxy S24", "Snapdragon 8 Gen 3 or Exynos 2400", "8 or 10", "8 GB"),
    "samsung SM-S928": Board("Galaxy S24 Ultra", "Snapdragon 8 Gen 3", "1x X4 + 5x A720 + 2x A520", "12 GB"),
    "samsung SM-S911": Board("Galaxy S23", "Snapdragon 8 Gen 2", "1x X3 + 2x A715 + 2x A710 + 3x A510", "8 GB"),
    "samsung SM-A546": Board("Galaxy A54", "Exynos 1380", "4x A78 + 4x A55", "6/8 GB"),
    "OnePlus CPH2581": Board("OnePlus 12", "Snapdragon 8 Gen 3", "1x X4 + 5x A720 + 2x A520", "12/16 GB"),
    "Xiaomi 23127PN0CG": Board("Xiaomi 14", "Snapdragon 8 Gen 3", "1x X4 + 5x A720 + 2x A520", "12/16 GB"),
}
"""What a device's own model text begins with -> what it is."""


def look_up(model: str) -> dict[str, Any]:
    """The entry with the longest key that `model` begins with; {} where there is none."""
    matches = [key for key in BOARDS if model.startswith(key)]
    return asdict(BOARDS[max(matches, key=len)]) if matches else {}
