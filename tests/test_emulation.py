"""Emulators and virtual machines are recognised by what a system tells: made-up ones, and a real qemu-user."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from efficientllm.devices.emulation import EXECUTABLE_LINK, Layer, detect_android_layer, detect_layer
from efficientllm.devices.local import executable_path, local_device_info

X86 = "processor : 0\nflags\t\t: fpu sse2 {}\n"
ARM = "processor : 0\nFeatures : fp asimd\n"


class FakeShell:
    """`sensors.Shell` over made-up files and commands."""

    def __init__(self, files: dict[str, str] | None = None, commands: dict[str, str] | None = None) -> None:
        self.files, self.commands = files or {}, commands or {}

    def read(self, pattern: str) -> list[str]:
        return [text for path, text in sorted(self.files.items()) if fnmatchcase(path, pattern)]

    def run(self, command: Sequence[str]) -> str | None:
        return self.commands.get(" ".join(command))


@pytest.mark.parametrize(
    ("program", "emulator"),
    [
        ("/usr/bin/qemu-aarch64-static", "qemu-user"),
        ("/usr/bin/qemu-aarch64", "qemu-user"),
        ("/run/rosetta/rosetta", "Rosetta"),
        ("/usr/local/bin/box64", "box64"),
        ("/usr/bin/FEXInterpreter", "FEX"),
        ("/usr/bin/python3.11", ""),
    ],
)
def test_a_program_that_runs_others_is_an_emulator(program: str, emulator: str) -> None:
    assert detect_layer(FakeShell(), "aarch64", program) == Layer(emulator, bool(emulator))


def test_programs_of_another_instruction_set_than_the_kernel_are_translated() -> None:
    kernel = FakeShell({"/proc/sys/kernel/arch": "x86_64"})
    assert detect_layer(kernel, "aarch64") == Layer("programs for aarch64 on a kernel for x86_64", True)
    assert detect_layer(kernel, "i686") == detect_layer(kernel, "AMD64") == Layer()
    older = FakeShell(commands={"uname -m": "aarch64\n"})  # Linux before 6.1, macOS
    assert detect_layer(older, "x86_64").translates
    assert detect_layer(older, "armv7l") == Layer()
    assert detect_layer(older, "arm64") == Layer()


@pytest.mark.parametrize(
    ("files", "commands", "expected"),
    [
        ({}, {"sysctl -n sysctl.proc_translated": "1\n"}, Layer("Rosetta", True)),
        ({}, {"sysctl -n sysctl.proc_translated": "0\n"}, Layer()),
        ({}, {"sysctl -n kern.hv_vmm_present": "1\n"}, Layer("virtual machine")),
        ({"/proc/cpuinfo": "model name : VirtualApple @ 2.50GHz processor\n"}, {}, Layer("Rosetta", True)),
        (
            {"/proc/cpuinfo": "model name : QEMU TCG CPU version 2.5+\n"},
            {},
            Layer("QEMU without hardware virtualisation", True),
        ),
        ({"/proc/sys/kernel/osrelease": "5.15.90.1-microsoft-standard-WSL2"}, {}, Layer("WSL 2")),
        ({"/proc/sys/kernel/osrelease": "4.4.0-19041-Microsoft"}, {}, Layer("WSL")),
        ({"/proc/cpuinfo": X86.format("hypervisor")}, {}, Layer("virtual machine")),
        ({"/proc/cpuinfo": X86.format("avx2")}, {}, Layer()),
        (
            {"/proc/cpuinfo": X86.format("hypervisor")},
            {"systemd-detect-virt --vm": "kvm\n"},
            Layer("virtual machine (kvm)"),
        ),
        (
            {"/proc/cpuinfo": X86.format("hypervisor")},
            {"systemd-detect-virt --vm": "qemu\n"},
            Layer("QEMU without hardware virtualisation", True),
        ),
        ({"/proc/cpuinfo": ARM}, {"systemd-detect-virt --vm": "qemu\n"}, Layer("virtual machine (qemu)")),
        (
            {"/proc/cpuinfo": ARM, "/proc/device-tree/compatible": "linux,dummy-virt"},
            {},
            Layer("virtual machine (dummy-virt)"),
        ),
        ({"/sys/class/dmi/id/sys_vendor": "QEMU"}, {}, Layer("virtual machine (QEMU)")),
        ({"/proc/cpuinfo": ARM, "/proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712"}, {}, Layer()),
    ],
)
def test_systems_are_told_by_their_signs(files: dict[str, str], commands: dict[str, str], expected: Layer) -> None:
    assert detect_layer(FakeShell(files, commands), "") == expected


@pytest.mark.parametrize(
    ("properties", "kernel", "expected"),
    [
        ({"ro.hardware": "ranchu"}, "aarch64", Layer("the Android emulator", True)),
        ({"ro.kernel.qemu": "1"}, "aarch64", Layer("the Android emulator", True)),
        ({"ro.hardware": "cutf_cvm"}, "aarch64", Layer("Cuttlefish", True)),
        ({"ro.hardware": "zuma"}, "x86_64", Layer("programs for arm64-v8a on a kernel for x86_64", True)),
        ({"ro.hardware": "zuma"}, "aarch64", Layer()),
    ],
)
def test_android_that_is_no_phone(properties: dict[str, str], kernel: str, expected: Layer) -> None:
    system = FakeShell({"/proc/sys/kernel/arch": kernel})
    assert detect_android_layer(system, "arm64-v8a", lambda name: properties.get(name, "")) == expected


def test_this_machine_is_no_emulator() -> None:
    info = local_device_info("local")
    assert not info.emulated, info.virtual
    if platform.system() == "Linux":
        assert Path(executable_path()).is_file()


def aarch64_program(path: Path) -> Path:
    """A static ELF file of fifteen instructions that prints where the symbolic link argv[1] leads."""
    code = struct.pack(
        "<15I",
        *(
            0xF9400BE1,
            0xD10803FF,
            0x92800C60,
            0x910003E2,
            0xD2804003,
        ),  # argv[1] to x1; AT_FDCWD, stack, 512
        *(0xD28009C8, 0xD4000001, 0xAA0003E2, 0xD2800020, 0x910003E1),  # readlinkat; x2 = length; x0 = 1; x1 = stack
        *(0xD2800808, 0xD4000001, 0xD2800000, 0xD2800BA8, 0xD4000001),  # write; exit(0)
    )
    size, base = 64 + 56 + len(code), 0x400000
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = identity + struct.pack("<HHIQQQIHHHHHH", 2, 183, 1, base + 120, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)
    path.write_bytes(header + segment + code)
    path.chmod(0o755)
    return path


@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
def test_a_real_qemu_hides_behind_one_name_only(tmp_path: Path) -> None:
    file = aarch64_program(tmp_path / "readlink")

    def link(path: str) -> str:
        command = ["qemu-aarch64-static", str(file), path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert detect_layer(FakeShell(), "aarch64", link("/proc/self/exe")) == Layer()
    assert detect_layer(FakeShell(), "aarch64", link(EXECUTABLE_LINK)) == Layer("qemu-user", True)
