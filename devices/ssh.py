"""Raspberry Pi and other boards, through the user's own OpenSSH."""

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
from .board_environment import (
    ENVIRONMENT_BYTES,
    EXTRAS,
    Requirement,
    engine_wheel,
    make_environment,
    runtime_requirement,
)
from .device import DeviceOptions
from .emulation import RUNNING_PROGRAM, look_up, recognise
from .local import parse_measurement, request_context
from .remote import RemoteShell, require_room, run_program
from .results import BenchOptions, DeviceInfo, Measurement
from .sensors import temperature_celsius

FOLDER = ".cache/efficientllm-bench"
"""On the board, below the home folder: environments and artefacts, each under its hash."""
PAUSES = (2.0, 10.0, 30.0)
"""Seconds before a step is tried again whose connection dropped: Wi-Fi comes back in its own time."""
BLOCK = 65_536
"""Bytes of a file in whose multiples an interrupted copy is gone on with."""
DROPPED = 255
"""ssh's own exit code: it could not connect, or lost the connection."""
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
"""Ends the measurement when standard input does, which is when the connection drops; one that outlived its connection
before the board noticed is ended first. Nothing is timed beside another measurement of this computer's."""


class SshDevice:
    """Measures in the board's own Python: an environment with this release and one engine is made there."""

    def __init__(self, options: DeviceOptions, say: Callable[[str], None]) -> None:
        self._options, self._say = options, say
        url = urlsplit(options.device)
        if not url.hostname or url.path.strip("/"):
            raise UsageError(f"--device {options.device!r}: give ssh://USER@HOST or ssh://USER@HOST:PORT")
        self._host = f"{url.username}@{url.hostname}" if url.username else url.hostname
        self._sockets = tempfile.TemporaryDirectory(prefix="ellm-")
        self._ssh = [
            *shlex.split(options.ssh),
            *(["-p", str(url.port)] if url.port else []),
            *("-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15"),
            # one connection for all commands, so that a password or a token is asked for once
            *("-o", "ControlMaster=auto", "-o", f"ControlPath={self._sockets.name}/%C", "-o", "ControlPersist=60"),
            *([] if sys.stdin.isatty() else ["-o", "BatchMode=yes"]),
        ]
        self._facts: dict[str, str] = {}
        self._environments: dict[str, str] = {}

    @property
    def name(self) -> str:
        """Of the board, in messages."""
        return self._host

    @property
    def facts(self) -> dict[str, str]:
        """What it told of itself, asked once."""
        if not self._facts:
            python = shlex.quote(self._options.board_python)
            answer = self.run(PROBE.replace("PYTHON", python).replace("PROGRAM", RUNNING_PROGRAM))
            pairs = (line.partition("=") for line in answer.output.splitlines())
            self._facts = {name: value.strip() for name, _, value in pairs}
            if "machine" not in self._facts:
                raise DeviceError(f"{self._host} gave no usable answer: {answer.last_error}")
        return self._facts

    def describe(self) -> DeviceInfo:
        facts = self.facts
        machine = facts["python_machine"] or facts["machine"]
        layer = recognise(RemoteShell(self.run), machine, facts["python_runs_in"])
        return DeviceInfo(
            name=f"ssh://{self._host}",
            system=facts["system"],
            machine=facts["machine"],
            cpu=facts["cpu"],
            cores=int(facts["cores"] or 1),
            ram_bytes=1024 * int(facts["ram_kb"] or 0),
            board=facts["board"],
            known=look_up(facts["board"]),
            virtual=layer.name,
            emulated=layer.translates,
        )

    def prepare(self, artefacts: list[Artefact], options: BenchOptions) -> None:
        facts = self.facts
        if facts["machine"].lower() not in MACHINES:
            raise DeviceError(
                f"{self._host} is {facts['machine']}; the engines need a 64-bit system ({', '.join(MACHINES)}): "
                "install a 64-bit operating system"
            )
        if facts["python_bits"] == "32":  # 32-bit systems of a Raspberry Pi run on a 64-bit kernel
            raise DeviceError(f"{self._host}: its Python is of 32 bits, the engines of 64; install a 64-bit system")
        version = facts["python"]
        if not version or tuple(map(int, version.split("."))) < (3, 11):
            raise DeviceError(
                f"{self._host}: {self._options.board_python} is {version or 'missing or has no venv module'}; "
                "install Python 3.11 or newer (apt install python3 python3-venv) or name it with --board-python"
            )
        free_ram, free_disk = 1024 * int(facts["free_ram_kb"] or 0), 1024 * int(facts["free_disk_kb"] or 0)
        extras = {EXTRAS[artefact.engine] for artefact in artefacts if artefact.engine in EXTRAS}
        taken = sum(ENVIRONMENT_BYTES[extra] for extra in extras)
        require_room(artefacts, options, max(free_disk - taken, 1), free_ram, self._host)
        for artefact in artefacts:
            self._copy(artefact)
        with tempfile.TemporaryDirectory() as scratch:
            requirement = runtime_requirement(self._options.wheel, Path(scratch), self._say)
            for engine in dict.fromkeys(artefact.engine for artefact in artefacts):
                self._environments[engine] = self._environment(engine, requirement)

    def temperature_celsius(self) -> float | None:
        return temperature_celsius(RemoteShell(self.run))

    def measure(self, artefact: Artefact, options: BenchOptions) -> Measurement:
        path = self._remote_path(artefact, artefact.path)
        request = measure.Request(str(path), request_context(artefact, options), asdict(options))
        python = f"{self._environments[artefact.engine]}/bin/python"
        measure_it = f"{python} -m {measure.__name__} {shlex.quote(json.dumps(asdict(request)))}"
        line = MEASURE.format(
            command=f"EFFICIENTLLM_CACHE={FOLDER} {measure_it}",  # cleaning up takes it along
            module=measure.__name__,
            pid_file=shlex.quote(f"{FOLDER}/measuring-{platform.node()}"),
        )
        idle, held = os.pipe()
        try:
            answer = self.run(line, stdin=idle, tries=1 + len(PAUSES))
        finally:
            os.close(idle)
            os.close(held)
        return parse_measurement(f"{self._host}: {artefact.path}", answer)

    def close(self) -> None:
        try:
            if self._options.clean_up and self._facts:
                self.run(f"rm -rf {FOLDER}")
        finally:
            with contextlib.suppress(DeviceError):  # without ssh there is no connection to end
                run_program([*self._ssh, "-O", "exit", self._host])
            self._sockets.cleanup()

    def run(self, line: str, stdin: int = subprocess.DEVNULL, tries: int = 0) -> ProcessResult:
        """Run a line of shell in the home folder; DeviceError where the board cannot be reached (any more).

        `tries` 0: again and again where that can help: half a stream cannot be sent again as it is, and a host that
        never answered will not answer now.
        """
        command = [*self._ssh, self._host, "--", f"sh -c {shlex.quote(line)}"]
        answer = run_program(command, stdin=stdin)
        tries = tries or (1 + len(PAUSES) if stdin == subprocess.DEVNULL and self._facts else 1)
        for attempt, pause in enumerate(PAUSES[: tries - 1], 2):
            if answer.code != DROPPED:
                break
            self._say(f"{self._host}: {answer.last_error}; trying again in {pause:g} s ({attempt}/{tries})")
            time.sleep(pause)
            answer = run_program(command, stdin=stdin)
        if answer.code == DROPPED:
            raise DeviceError(f"{self._host} cannot be reached: {answer.last_error}; try: ssh {self._host}")
        return answer

    def _remote_path(self, artefact: Artefact, file: Path) -> PurePosixPath:
        """Where a file of the artefact, or its folder, lies on the board."""
        folder = PurePosixPath(FOLDER) / "artefacts" / artefact.sha256[:32]
        return folder / file.relative_to(artefact.folder).as_posix()

    def _copy(self, artefact: Artefact) -> None:
        """Copy the files whose hash differs there. An interrupted file stays as NAME.part and is gone on with."""
        for file in artefact.files:
            self.copy(file, self._remote_path(artefact, file))

    def copy(self, file: Path, target: PurePosixPath) -> None:
        """Copy a file, unless it is there; an interrupted one is gone on with."""
        digest, size, quoted = sha256_of(file), file.stat().st_size, shlex.quote(str(target))
        if self._remote_sha256(quoted) == digest:
            return
        part = shlex.quote(f"{target}.part")
        self.require(f"mkdir -p {shlex.quote(str(target.parent))}")
        for pause in (*PAUSES, None):
            there = int(self.run(f"wc -c < {part} 2>/dev/null || echo 0").output.split()[-1])
            if there > size:
                self.require(f"rm -f {part}")
                there = 0
            blocks = there // BLOCK
            copied = blocks * BLOCK
            self._say(f"copying {file.name}" + (f" from byte {copied:,} on" if copied else ""))
            try:
                with file.open("rb", buffering=0) as stream:
                    os.lseek(stream.fileno(), copied, os.SEEK_SET)
                    # at its own place, not at the end: what an interrupted one still writes are the same bytes there
                    self.run(f"dd of={part} bs={BLOCK} seek={blocks} conv=notrunc", stdin=stream.fileno())
            except DeviceError:
                if pause is None:
                    raise
                time.sleep(pause)
                continue
            if self._remote_sha256(part) == digest:
                self.require(f"mv {part} {quoted}")
                return
            self.require(f"rm -f {part}")  # complete, but not what was sent
        raise DeviceError(
            f"{file} arrived damaged {1 + len(PAUSES)} times; check the board's disk (dmesg) and run again"
        )

    def _remote_sha256(self, quoted: str) -> str:
        answer = self.run(f"sha256sum {quoted} 2>/dev/null")
        found = re.match(r"\\?([0-9a-f]{64})", answer.output)
        return found[1] if found else ""

    def require(self, line: str) -> None:
        """Run a line of shell; DeviceError where it fails."""
        answer = self.run(line)
        if answer.code != 0:
            raise DeviceError(f"{self._host}: {answer.last_error}")

    def _environment(self, engine: str, requirement: Requirement) -> str:
        """Folder of the environment with this release and `engine`, made where it is not complete."""
        if engine not in EXTRAS:
            raise DeviceError(f"engine {engine!r} is a plug-in's; boards run {', '.join(EXTRAS)}")
        extra = EXTRAS[engine]
        sent = engine_wheel(extra, self.facts, self._options.engine_wheels)
        key = f"{requirement.key}-{sha256_of(sent.wheel)[:8]}" if sent is not None else requirement.key
        folder = f"{FOLDER}/env-{extra}-{key}"
        if self.run(f"test -f {folder}/complete").code != 0:
            self._say(f"installing efficientllm[{extra}] on {self._host}; this may take minutes")
            make_environment(self, extra, requirement, sent, self._options.board_python, folder)
        return folder
