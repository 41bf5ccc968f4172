"""Measurement on Android phones over adb: a runner program and the artefact are pushed and run there."""

from __future__ import annotations

import functools
import re
import shlex
import struct
from collections.abc import Callable
from pathlib import Path

from ..runtime.base.child import ProcessResult
from ..runtime.base.errors import DeviceError, UsageError
from ..runtime.base.files import sha256_of
from ..runtime.engines.artefact import Artefact
from .device import DeviceOptions
from .emulation import detect_android_emulator
from .llama_bench import PROGRAM, calls_of, parse_output
from .local import request_context
from .phone_monitor import ProgramRecord, RunnerCall, monitor_script, parse_record, summarize_calls
from .remote import RemoteShell, require_room, run_program
from .results import BenchOptions, DeviceInfo, Measurement
from .sensors import battery_celsius, temperature_celsius

FOLDER = "/data/local/tmp/efficientllm"
"""Folder in which adb's shell may run programs."""
DEFAULT_RUNNER = Path("build/android-runner/llama-bench")
"""Output of `make android-runner`."""
RUNNER_ORIGIN = "build it with `make android-runner`"
ELF_MACHINES = {"arm64-v8a": 183, "x86_64": 62}
"""Maps Android's name of an instruction set to e_machine of its ELF files."""
STATE_REMEDIES = {
    "unauthorized": "unlock the phone and accept this computer's key",
    "authorizing": "unlock the phone and accept this computer's key",
    "offline": "unplug the phone, or run: adb reconnect",
    "no permissions": "add a udev rule for the phone (apt install android-sdk-platform-tools-common)",
    "recovery": "restart the phone into Android",
    "bootloader": "restart the phone into Android",
}
"""Maps a state of `adb devices` to its remedy."""


def find_serial(text: str, wanted: str) -> str:
    """Return the serial of the only usable device in the output of `adb devices -l`.

    Raises DeviceError with the remedy if there is none, or several.
    """
    devices = {}
    for line in text.splitlines():
        match = re.match(r"(\S+)\s+(no permissions|[a-z]+)\b", line)
        if match and not line.startswith(("List of devices", "*", "adb")):
            devices[match[1]] = match[2]
    if wanted and wanted not in devices:
        raise DeviceError(f"adb has no device {wanted}; it has: {', '.join(devices) or 'none'} (see: adb devices)")
    if not devices:
        raise DeviceError(
            "adb has no device: connect the phone and enable USB debugging in its developer options (see: adb devices)"
        )
    if len(devices) > 1 and not wanted:
        raise DeviceError(f"adb has several devices; name one: {', '.join(f'--device adb:{name}' for name in devices)}")
    serial = wanted or next(iter(devices))
    if devices[serial] != "device":
        raise DeviceError(f"{serial} is {devices[serial]}: {STATE_REMEDIES.get(devices[serial], 'see: adb devices')}")
    return serial


def elf_machine(path: Path) -> int:
    """Return e_machine of an ELF file. Raises UsageError for other files."""
    with path.open("rb") as stream:
        header = stream.read(20)
    if len(header) < 20 or header[:4] != b"\x7fELF":
        raise UsageError(f"--runner {path} is not a Linux or Android program (ELF); {RUNNER_ORIGIN}")
    return struct.unpack_from("<H", header, 18)[0]


class AdbDevice:
    """A phone. Programs built for it measure, because it has no Python."""

    def __init__(self, options: DeviceOptions, log: Callable[[str], None]) -> None:
        self._options, self._log = options, log
        _, _, wanted = options.device.partition(":")
        listing = run_program(["adb", "devices", "-l"], timeout=60)
        if listing.code != 0:
            raise DeviceError(f"adb devices: {listing.last_error}")
        self._serial = find_serial(listing.output, wanted)
        self._shell = RemoteShell(self._run)
        self._runner_path = ""

    def describe(self) -> DeviceInfo:
        return self._info

    @functools.cached_property
    def _info(self) -> DeviceInfo:
        def prop(name: str) -> str:
            return self._run(f"getprop {name}").output.strip()

        board = f"{prop('ro.product.manufacturer')} {prop('ro.product.model')}".strip()
        abi = prop("ro.product.cpu.abi")
        return DeviceInfo(
            name=f"adb:{self._serial}",
            system=f"Android {prop('ro.build.version.release')}",
            machine=abi,
            cpu=prop("ro.soc.model") or prop("ro.board.platform"),
            cores=int(self._run("nproc").output.strip() or 1),
            ram_bytes=self._memory("MemTotal"),
            board=board,
            emulator=detect_android_emulator(self._shell, abi, prop),
        )

    def prepare(self, artefacts: list[Artefact], options: BenchOptions) -> None:
        for artefact in artefacts:
            if artefact.engine != "llama.cpp":
                raise UsageError(f"{artefact.path}: a phone measures .gguf artefacts only, not {artefact.engine}")
        path = Path(self._options.runner) if self._options.runner else DEFAULT_RUNNER
        if not path.is_file():
            raise UsageError(f"--runner {path} does not exist; {RUNNER_ORIGIN}")
        machine = elf_machine(path)
        if ELF_MACHINES.get(self._info.machine) != machine:
            raise DeviceError(
                f"{path} is built for another processor (ELF machine {machine}) than {self._serial}, which is "
                f"{self._info.machine}; see `make android-runner`"
            )
        disk = re.findall(r"^\S+\s+\d+\s+\d+\s+(\d+)", self._run("df -k /data/local/tmp").output, re.MULTILINE)
        free_disk = 1024 * int(disk[-1]) if disk else 0
        require_room(artefacts, options, free_disk, self._memory("MemAvailable"), self._serial)
        self._runner_path = f"{FOLDER}/{PROGRAM}"
        self._push(path, self._runner_path)
        self._require(f"chmod 755 {self._runner_path}")
        for artefact in artefacts:
            for file in artefact.files:
                self._push(file, f"{self._folder(artefact)}/{file.name}")

    def temperature_celsius(self) -> float | None:
        return battery_celsius(self._shell) or temperature_celsius(self._shell)

    def measure(self, artefact: Artefact, options: BenchOptions) -> Measurement:
        calls = []
        for arguments in calls_of(artefact, options):
            record = self._run_monitored(artefact, [self._runner_path, *arguments])
            calls.append(RunnerCall(parse_output(record.output), record))
        return summarize_calls(calls, artefact.cache_bytes(request_context(artefact, options), 2), options)

    def close(self) -> None:
        if self._options.clean_up and self._runner_path:
            self._run(f"rm -rf {FOLDER}")

    def _folder(self, artefact: Artefact) -> str:
        return f"{FOLDER}/{artefact.sha256[:32]}"

    def _run_monitored(self, artefact: Artefact, command: list[str]) -> ProgramRecord:
        """Run a program in the artefact's folder and return its record. Raises DeviceError if it fails."""
        answer = self._run(monitor_script(self._folder(artefact), command))
        record = parse_record(answer.output)
        if record.code != 0:
            lines = record.errors.strip().splitlines() or [answer.last_error]
            killed = "; the phone ran out of memory" if record.code == 137 else ""
            raise DeviceError(f"{artefact.path} on {self._serial}: {lines[-1]}{killed}")
        return record

    def _push(self, file: Path, target: str) -> None:
        """Push a file under another name, compare the hashes there, and rename it."""
        # a partial file must not be used, even if the connection is lost amid the push
        digest = sha256_of(file)
        if self._sha256(target) == digest:
            return
        self._log(f"pushing {file.name}")
        self._require(f"mkdir -p {shlex.quote(target.rpartition('/')[0])}")
        answer = run_program(["adb", "-s", self._serial, "push", str(file), f"{target}.part"])
        if answer.code != 0:
            self._run(f"rm -f {shlex.quote(target)}.part")
            raise DeviceError(f"adb push {file.name}: {answer.last_error}")
        if self._sha256(f"{target}.part") != digest:
            self._run(f"rm -f {shlex.quote(target)}.part")
            raise DeviceError(f"{file.name} arrived damaged on {self._serial}; check the cable and run again")
        self._require(f"mv {shlex.quote(target)}.part {shlex.quote(target)}")

    def _sha256(self, path: str) -> str:
        found = re.match(r"[0-9a-f]{64}", self._run(f"sha256sum {shlex.quote(path)} 2>/dev/null").output)
        return found[0] if found else ""

    def _memory(self, name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB", self._run("cat /proc/meminfo").output, re.MULTILINE)
        return 1024 * int(found[1]) if found else 0

    def _run(self, line: str) -> ProcessResult:
        answer = run_program(["adb", "-s", self._serial, "shell", line])
        # These prefixes are errors of adb itself, not of the command.
        if answer.code != 0 and re.match(r"(adb: |error: )", answer.errors):
            raise DeviceError(f"{self._serial} cannot be reached: {answer.last_error}")
        return answer

    def _require(self, line: str) -> None:
        answer = self._run(line)
        if answer.code != 0:
            raise DeviceError(f"{self._serial}: {answer.last_error}")
