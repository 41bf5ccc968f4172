"""Detection of emulators and virtual machines, whose figures do not describe the device.

Sources: QEMU's linux-user/syscall.c, whose is_proc_myself hides the emulator behind /proc/self/exe only;
/proc/sys/kernel/arch (Linux 6.1); Apple's sysctl.proc_translated and kern.hv_vmm_present; AOSP's hardware names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .sensors import Shell

EXECUTABLE_LINK = "/proc/self/task/../exe"
"""Link to the executable that Linux runs. Under emulation it names the emulator, unlike /proc/self/exe."""
EMULATORS = {
    "qemu-": "qemu-user",
    "rosetta": "Rosetta",
    "box64": "box64",
    "box86": "box86",
    "FEX": "FEX",
    "blink": "blink",
}
"""Maps the prefix of an executable's name to the emulator's."""
INSTRUCTION_SETS = {"x86": re.compile(r"x86|amd64|i\d86"), "arm": re.compile(r"aarch64|arm")}
ANDROID_HARDWARE = {
    "goldfish": "the Android emulator",
    "ranchu": "the Android emulator",
    "cutf_cvm": "Cuttlefish",
    "cutf": "Cuttlefish",
    "vbox86": "Genymotion",
    "redroid": "redroid, Android in a container",
    "waydroid": "Waydroid, Android in a container",
}
"""Maps ro.hardware to the emulator or container that sets it."""
VIRTUAL_HARDWARE = re.compile(
    r"KVM|QEMU|VMware|VirtualBox|Virtual Machine|Xen|HVM|Bochs|Parallels|BHYVE|Firecracker|dummy-virt"
)
"""Words in a virtual machine's firmware names."""
EMULATED_QEMU = "QEMU without hardware virtualisation"


@dataclass(frozen=True)
class Layer:
    """The software between a program and the hardware. An empty name means that none was found."""

    name: str = ""
    translates: bool = False
    """True if instructions are translated. No figure describes the device then."""


def instruction_set(machine: str) -> str:
    """Return "x86" or "arm", of 32 or 64 bits, for a machine name of uname or Android, and "" for others."""
    return next((name for name, pattern in INSTRUCTION_SETS.items() if pattern.match(machine.lower())), "")


def detect_layer(shell: Shell, machine: str, executable: str = "") -> Layer:
    """Return the layer below a program that is built for `machine`, on the device behind `shell`.

    `executable` is the target of EXECUTABLE_LINK for that program, or "" if it is unknown.
    """
    name = executable.rpartition("/")[2]
    for prefix, emulator in EMULATORS.items():
        if name.startswith(prefix):
            return Layer(emulator, True)
    kernel = (shell.read("/proc/sys/kernel/arch") or [shell.run(["uname", "-m"]) or ""])[0].strip()
    built_for, runs_on = instruction_set(machine), instruction_set(kernel)
    if built_for and runs_on and built_for != runs_on:
        return Layer(f"programs for {machine} on a kernel for {kernel}", True)
    return _macos_layer(shell) or _linux_layer(shell) or Layer()


def _macos_layer(shell: Shell) -> Layer | None:
    if shell.run(["sysctl", "-n", "sysctl.proc_translated"]) == "1\n":
        return Layer("Rosetta", True)
    if shell.run(["sysctl", "-n", "kern.hv_vmm_present"]) == "1\n":
        return Layer("virtual machine")
    return None


def _linux_layer(shell: Shell) -> Layer | None:
    cpuinfo = "\n".join(shell.read("/proc/cpuinfo"))
    if "VirtualApple" in cpuinfo:  # Rosetta's processor name in a Linux container
        return Layer("Rosetta", True)
    if "QEMU TCG" in cpuinfo:
        return Layer(EMULATED_QEMU, True)
    release = "".join(shell.read("/proc/sys/kernel/osrelease"))
    if "microsoft" in release.lower():
        return Layer("WSL 2" if "WSL2" in release else "WSL")
    hypervisor = (shell.run(["systemd-detect-virt", "--vm"]) or "").strip()
    # On x86, systemd reports TCG as "qemu". On other machines it cannot distinguish TCG from KVM.
    if hypervisor == "qemu" and re.search(r"^flags\s*:", cpuinfo, re.MULTILINE):
        return Layer(EMULATED_QEMU, True)
    if hypervisor not in ("", "none"):
        return Layer(f"virtual machine ({hypervisor})")
    files = ("/sys/class/dmi/id/sys_vendor", "/sys/class/dmi/id/product_name", "/proc/device-tree/compatible")
    hardware = VIRTUAL_HARDWARE.search(" ".join(text for file in files for text in shell.read(file)))
    if hardware:
        return Layer(f"virtual machine ({hardware[0]})")
    has_flag = re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE)
    return Layer("virtual machine") if has_flag else None


def detect_android_layer(shell: Shell, abi: str, prop: Callable[[str], str]) -> Layer:
    """Return the layer of an Android system whose programs are built for `abi`. `prop` calls getprop."""
    for name in ("ro.hardware", "ro.boot.hardware"):
        if prop(name) in ANDROID_HARDWARE:
            return Layer(ANDROID_HARDWARE[prop(name)], True)
    if "1" in (prop("ro.boot.qemu"), prop("ro.kernel.qemu")):
        return Layer("the Android emulator", True)
    return detect_layer(shell, abi)
