"""Measurement on a Raspberry Pi or another board, with the user's own OpenSSH client."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from ..runtime.base.child import ProcessResult
from ..runtime.base.errors import DeviceError, UsageError
from ..runtime.base.files import sha256_of
from ..runtime.engines.artefact import Artefact
from . import measure
from .board_environment import ENVIRONMENT_BYTES, EXTRAS, engine_wheel, make_environment, runtime_wheel
from .device import DeviceOptions
from .emulation import EXECUTABLE_LINK, detect_emulator
from .local import parse_measurement, request_context
from .remote import RemoteShell, require_room, run_program
from .results import BenchOptions, DeviceInfo, Measurement
from .sensors import temperature_celsius

FOLDER = ".cache/efficientllm-bench"
"""Folder on the board, below the home folder, with environments and artefacts by hash."""
RETRY_SECONDS = (2.0, 10.0, 30.0)
"""Waits before a step with a lost connection is tried again, long enough for Wi-Fi to reconnect."""
BLOCK_BYTES = 65_536
"""An interrupted copy resumes at a multiple of this many bytes."""
CONNECTION_LOST = 255
"""Exit code of ssh itself: it could not connect, or lost the connection."""
MACHINES = ("aarch64", "arm64", "x86_64", "amd64")

PROBE = r"""
echo system=$(uname -sr)
echo machine=$(uname -m)
echo cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
echo ram_kb=$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo)
echo free_ram_kb=$(sed -n 's/^MemAvailable: *\([0-9]*\).*/\1/p' /proc/meminfo)
echo free_disk_kb=$(df -Pk "$HOME" | awk 'NR == 2 {print $4}')
echo board=$(tr -d '\0' < /proc/device-tree/model 2>/dev/null || cat /sys/class/dmi/id/product_name 2>/dev/null)
echo cpu=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1)
echo features=$(sed -n 's/^Features[^:]*: *//p' /proc/cpuinfo | head -n 1)
echo python=$(PYTHON -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
echo python_bits=$(PYTHON -c 'import struct; print(8 * struct.calcsize("P"))' 2>/dev/null)
echo python_machine=$(PYTHON -c 'import os; print(os.uname().machine)' 2>/dev/null)
echo python_runs_in=$(PYTHON -c 'import os; print(os.readlink("PROGRAM"))' 2>/dev/null)
"""

MEASURE = r"""
pid_file={pid_file}
pid=$(cat $pid_file 2> /dev/null) && grep -q {module} /proc/$pid/cmdline 2> /dev/null && kill $pid
exec 3<&0
{command} < /dev/null &
pid=$!
echo $pid > $pid_file
(cat <&3; kill $pid) > /dev/null 2>&1 &
watcher=$!
wait $pid
code=$?
kill $watcher 2> /dev/null
rm -f $pid_file
exit $code
"""
"""Shell script that kills the measurement when standard input ends, which happens when the connection drops.

It first kills a measurement that survived its connection, so that this computer never times two at once.
"""


class SshDevice:
    """A board. Its own Python measures, in an environment with this release and one engine."""

    def __init__(self, options: DeviceOptions, log: Callable[[str], None]) -> None:
        self._options, self._log = options, log
        remedy = f"--device {options.device!r}: give ssh://USER@HOST or ssh://USER@HOST:PORT"
        try:
            url = urlsplit(options.device)
            port = url.port
        except ValueError as error:  # a port that is no number, half a pair of brackets
            raise UsageError(remedy) from error
        if not url.hostname or url.path.strip("/"):
            raise UsageError(remedy)
        self._host = f"{url.username}@{url.hostname}" if url.username else url.hostname
        self._sockets = tempfile.TemporaryDirectory(prefix="ellm-")
        self._ssh = [
            *shlex.split(options.ssh),
            *(["-p", str(port)] if port else []),
            *("-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15"),
            # One connection for all commands, so that ssh asks once for a password or a token.
            *("-o", "ControlMaster=auto", "-o", f"ControlPath={self._sockets.name}/%C", "-o", "ControlPersist=60"),
            *([] if sys.stdin.isatty() else ["-o", "BatchMode=yes"]),
        ]
        self._facts: dict[str, str] = {}
        self._environments: dict[str, str] = {}

    @property
    def name(self) -> str:
        """Return the board's name in messages."""
        return self._host

    @property
    def facts(self) -> dict[str, str]:
        """Return the output of PROBE by name. The board is asked once."""
        if not self._facts:
            python = shlex.quote(self._options.board_python)
            answer = self.run(PROBE.replace("PYTHON", python).replace("PROGRAM", EXECUTABLE_LINK))
            pairs = (line.partition("=") for line in answer.output.splitlines())
            self._facts = {name: value.strip() for name, _, value in pairs}
            if "machine" not in self._facts:
                raise DeviceError(f"{self._host} gave no usable answer ({answer.last_error}); try: ssh {self._host}")
        return self._facts

    def describe(self) -> DeviceInfo:
        facts = self.facts
        machine = facts["python_machine"] or facts["machine"]
        emulator = detect_emulator(RemoteShell(self.run), machine, facts["python_runs_in"])
        return DeviceInfo(
            name=f"ssh://{self._host}",
            system=facts["system"],
            machine=facts["machine"],
            cpu=facts["cpu"],
            cores=int(facts["cores"] or 1),
            ram_bytes=1024 * int(facts["ram_kb"] or 0),
            board=facts["board"],
            emulator=emulator,
        )

    def prepare(self, artefacts: list[Artefact], options: BenchOptions) -> None:
        facts = self.facts
        if facts["machine"].lower() not in MACHINES:
            raise DeviceError(
                f"{self._host} is {facts['machine']}; the engines need a 64-bit system ({', '.join(MACHINES)}): "
                "install a 64-bit operating system"
            )
        if facts["python_bits"] == "32":  # 32-bit systems of a Raspberry Pi run on a 64-bit kernel
            raise DeviceError(f"{self._host} has a 32-bit Python, the engines need 64 bits; install a 64-bit system")
        version = facts["python"]
        if not version or tuple(map(int, version.split("."))) < (3, 11):
            raise DeviceError(
                f"{self._host}: {self._options.board_python} is {version or 'missing or has no venv module'}; "
                "install Python 3.11 or newer (apt install python3 python3-venv) or name it with --board-python"
            )
        free_ram, free_disk = 1024 * int(facts["free_ram_kb"] or 0), 1024 * int(facts["free_disk_kb"] or 0)
        extras = {EXTRAS[artefact.engine] for artefact in artefacts if artefact.engine in EXTRAS}
        reserved = sum(ENVIRONMENT_BYTES[extra] for extra in extras)
        require_room(artefacts, options, max(free_disk - reserved, 1), free_ram, self._host)
        for artefact in artefacts:
            self._copy(artefact)
        with tempfile.TemporaryDirectory() as scratch:
            wheel = runtime_wheel(self._options.wheel, Path(scratch), self._log)
            for engine in dict.fromkeys(artefact.engine for artefact in artefacts):
                self._environments[engine] = self._environment(engine, wheel)

    def temperature_celsius(self) -> float | None:
        return temperature_celsius(RemoteShell(self.run))

    def measure(self, artefact: Artefact, options: BenchOptions) -> Measurement:
        path = self._remote_path(artefact, artefact.path)
        request = measure.Request(str(path), request_context(artefact, options), asdict(options))
        python = f"{self._environments[artefact.engine]}/bin/python"
        command = f"{python} -m {measure.__name__} {shlex.quote(json.dumps(asdict(request)))}"
        line = MEASURE.format(
            command=f"EFFICIENTLLM_CACHE={FOLDER} {command}",  # --clean-up removes the cache too
            module=measure.__name__,
            pid_file=shlex.quote(f"{FOLDER}/measuring-{platform.node()}"),
        )
        # nothing is written into the pipe: the script on the board waits for its end, which comes if this process ends
        idle, held = os.pipe()
        try:
            answer = self.run(line, stdin=idle, tries=1 + len(RETRY_SECONDS))
        finally:
            os.close(idle)
            os.close(held)
        return parse_measurement(f"{self._host}: {artefact.path}", answer)

    def close(self) -> None:
        try:
            if self._options.clean_up and self._facts:
                self.run(f"rm -rf {FOLDER}")
        finally:
            with contextlib.suppress(DeviceError):  # without ssh there is no connection to close
                run_program([*self._ssh, "-O", "exit", self._host])
            self._sockets.cleanup()

    def run(self, line: str, stdin: int = subprocess.DEVNULL, tries: int = 0) -> ProcessResult:
        """Run a shell command line in the home folder. Raises DeviceError if the board cannot be reached.

        With `tries` 0, a lost connection is retried if a retry can help.
        """
        command = [*self._ssh, self._host, "--", f"sh -c {shlex.quote(line)}"]
        answer = run_program(command, stdin=stdin)
        if not tries:
            # a partly sent stream cannot be sent again, and a host that never answered will not answer now
            can_help = stdin == subprocess.DEVNULL and self._facts
            tries = 1 + len(RETRY_SECONDS) if can_help else 1
        for attempt, seconds in enumerate(RETRY_SECONDS[: tries - 1], 2):
            if answer.code != CONNECTION_LOST:
                break
            self._log(f"{self._host}: {answer.last_error}; trying again in {seconds:g} s ({attempt}/{tries})")
            time.sleep(seconds)
            answer = run_program(command, stdin=stdin)
        if answer.code == CONNECTION_LOST:
            raise DeviceError(f"{self._host} cannot be reached: {answer.last_error}; try: ssh {self._host}")
        return answer

    def require(self, line: str) -> None:
        """Run a shell command line. Raises DeviceError if it fails."""
        answer = self.run(line)
        if answer.code != 0:
            raise DeviceError(f"{self._host}: {answer.last_error}")

    def _remote_path(self, artefact: Artefact, file: Path) -> PurePosixPath:
        """Return the path on the board of a file of the artefact, or of its folder."""
        folder = PurePosixPath(FOLDER) / "artefacts" / artefact.sha256[:32]
        return folder / file.relative_to(artefact.folder).as_posix()

    def _copy(self, artefact: Artefact) -> None:
        for file in artefact.files:
            self.copy(file, self._remote_path(artefact, file))

    def copy(self, file: Path, target: PurePosixPath) -> None:
        """Copy a file unless the board has it. An interrupted copy stays as NAME.part and is resumed."""
        digest, size, quoted = sha256_of(file), file.stat().st_size, shlex.quote(str(target))
        if self._remote_sha256(quoted) == digest:
            return
        part = shlex.quote(f"{target}.part")
        self.require(f"mkdir -p {shlex.quote(str(target.parent))}")
        for seconds in (*RETRY_SECONDS, None):
            part_bytes = int(self.run(f"wc -c < {part} 2>/dev/null || echo 0").output.split()[-1])
            if part_bytes > size:  # of an earlier file of this name
                self.require(f"rm -f {part}")
                part_bytes = 0
            blocks = part_bytes // BLOCK_BYTES
            copied = blocks * BLOCK_BYTES
            self._log(f"copying {file.name}" + (f" from byte {copied:,} on" if copied else ""))
            try:
                with file.open("rb", buffering=0) as stream:
                    os.lseek(stream.fileno(), copied, os.SEEK_SET)
                    # dd seeks instead of appending, because an interrupted copy may still write. Its bytes are equal.
                    self.run(f"dd of={part} bs={BLOCK_BYTES} seek={blocks} conv=notrunc", stdin=stream.fileno())
            except DeviceError:
                if seconds is None:
                    raise
                time.sleep(seconds)
                continue
            if self._remote_sha256(part) == digest:
                self.require(f"mv {part} {quoted}")
                return
            self.require(f"rm -f {part}")  # complete but damaged
        raise DeviceError(
            f"{file} arrived damaged {1 + len(RETRY_SECONDS)} times; check the board's disk (dmesg) and run again"
        )

    def _remote_sha256(self, quoted: str) -> str:
        answer = self.run(f"sha256sum {quoted} 2>/dev/null")
        found = re.match(r"\\?([0-9a-f]{64})", answer.output)
        return found[1] if found else ""

    def _environment(self, engine: str, wheel: Path) -> str:
        """Return the folder of the environment with this release and `engine`, and create it if needed."""
        if engine not in EXTRAS:
            raise DeviceError(f"engine {engine!r} belongs to a plug-in; boards run {', '.join(EXTRAS)}")
        extra = EXTRAS[engine]
        compiled = engine_wheel(extra, self.facts, self._options.engine_wheels)
        key = sha256_of(wheel)[:12]  # changes with the contents, so that another release gets an environment of its own
        key += f"-{sha256_of(compiled.path)[:8]}" if compiled is not None else ""
        folder = f"{FOLDER}/env-{extra}-{key}"
        # written last, so that an interrupted installation starts again
        if self.run(f"test -f {folder}/complete").code != 0:
            self._log(f"installing efficientllm[{extra}] on {self._host}; this may take minutes")
            make_environment(self, extra, wheel, compiled, self._options.board_python, folder)
        return folder
