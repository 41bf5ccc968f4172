"""Emulators are recognised by what a system tells: made-up ones, and a real qemu-user."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from efficientllm.devices.emulation import EXECUTABLE_LINK, detect_android_emulator, detect_emulator
from efficientllm.devices.local import executable_path, local_device_info


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
def test_program_that_runs_others_names_the_emulator(program: str, emulator: str) -> None:
    assert detect_emulator(FakeShell(), "aarch64", program) == emulator


def test_program_of_another_instruction_set_than_the_kernel_is_emulated() -> None:
    kernel = FakeShell({"/proc/sys/kernel/arch": "x86_64"})
    assert detect_emulator(kernel, "aarch64") == "programs for aarch64 on a kernel for x86_64"
    assert detect_emulator(kernel, "i686") == detect_emulator(kernel, "AMD64") == ""
    older = FakeShell(commands={"uname -m": "aarch64\n"})  # Linux before 6.1, macOS
    assert detect_emulator(older, "x86_64")
    assert not detect_emulator(older, "armv7l")
    assert not detect_emulator(older, "arm64")


@pytest.mark.parametrize(
    ("files", "commands", "expected"),
    [
        ({}, {"sysctl -n sysctl.proc_translated": "1\n"}, "Rosetta"),
        ({}, {"sysctl -n sysctl.proc_translated": "0\n"}, ""),
        ({"/proc/cpuinfo": "model name : VirtualApple @ 2.50GHz processor\n"}, {}, "Rosetta"),
        ({"/proc/cpuinfo": "model name : QEMU TCG CPU version 2.5+\n"}, {}, "QEMU without hardware virtualisation"),
        ({"/proc/cpuinfo": "processor : 0\nflags : fpu hypervisor\n"}, {}, ""),
    ],
)
def test_systems_tell_their_emulator(files: dict[str, str], commands: dict[str, str], expected: str) -> None:
    assert detect_emulator(FakeShell(files, commands), "") == expected


@pytest.mark.parametrize(
    ("properties", "kernel", "expected"),
    [
        ({"ro.hardware": "ranchu"}, "aarch64", "Android without a phone (ranchu)"),
        ({"ro.kernel.qemu": "1"}, "aarch64", "Android without a phone (qemu)"),
        ({"ro.hardware": "cutf_cvm"}, "aarch64", "Android without a phone (cutf_cvm)"),
        ({"ro.hardware": "zuma"}, "x86_64", "programs for arm64-v8a on a kernel for x86_64"),
        ({"ro.hardware": "zuma"}, "aarch64", ""),
    ],
)
def test_android_without_a_phone_is_named(properties: dict[str, str], kernel: str, expected: str) -> None:
    system = FakeShell({"/proc/sys/kernel/arch": kernel})
    assert detect_android_emulator(system, "arm64-v8a", lambda name: properties.get(name, "")) == expected


def test_this_machine_translates_nothing() -> None:
    info = local_device_info("local")
    assert not info.emulator
    if platform.system() == "Linux":
        assert Path(executable_path()).is_file()


def aarch64_program(path: Path) -> Path:
    """A static ELF file of fifteen instructions that prints where the symbolic link argv[1] leads."""
    code = struct.pack(
        "<15I",
        *(0xF9400BE1, 0xD10803FF, 0x92800C60, 0x910003E2, 0xD2804003),  # argv[1] to x1; AT_FDCWD, stack, 512
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

    assert not detect_emulator(FakeShell(), "aarch64", link("/proc/self/exe"))
    assert detect_emulator(FakeShell(), "aarch64", link(EXECUTABLE_LINK)) == "qemu-user"
