"""Raspberry Pi and other boards, through the user's own OpenSSH."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from ..runtime.base.child import Finished
from ..runtime.base.errors import DeviceError, UsageError
from ..runtime.base.files import sha256_of
from ..runtime.engines.artefact import Artefact
from . import measure
from .boards import look_up
from .device import DeviceOptions
from .local import parse_measurement, request_context
from .remote import RemoteShell, require_room, run_program
from .results import BenchOptions, DeviceInfo, Measurement
from .sensors import temperature_celsius
from .wheel import Requirement, runtime_requirement

FOLDER = ".cache/efficientllm-bench"
"""On the board, below the home folder: environments and artefacts, each under its hash."""
ATTEMPTS = 3
"""Times a step is tried where the connection drops."""
DROPPED = 255
"""ssh's own exit code: it could not connect, or lost the connection."""
MACHINES = ("aarch64", "arm64", "x86_64", "amd64")
EXTRAS = {"llama.cpp": "gguf", "onnxruntime": "onnx", "onnxruntime-genai": "genai", "executorch": "executorch"}
"""Engine -> the extra that brings it."""
ENVIRONMENT_BYTES = 600_000_000
"""Free disk that an environment with one engine needs at most."""

PROBE = r"""
echo system=$(uname -sr)
echo machine=$(uname -m)
echo cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
echo ram_kb=$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo)
echo free_ram_kb=$(sed -n 's/^MemAvailable: *\([0-9]*\).*/\1/p' /proc/meminfo)
echo free_disk_kb=$(df -Pk "$HOME" | awk 'NR == 2 {print $4}')
echo board=$(tr -d '\0' < /proc/device-tree/model 2>/dev/null || cat /sys/class/dmi/id/product_name 2>/dev/null)
echo cpu=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1)
echo python=$(PYTHON -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
"""


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

    def describe(self) -> DeviceInfo:
        facts = self._probe()
        return DeviceInfo(
            name=f"ssh://{self._host}",
            system=facts["system"],
            machine=facts["machine"],
            cpu=facts["cpu"],
            cores=int(facts["cores"] or 1),
            ram_bytes=1024 * int(facts["ram_kb"] or 0),
            board=facts["board"],
            known=look_up(facts["board"]),
        )

    def prepare(self, artefacts: list[Artefact], options: BenchOptions) -> None:
        facts = self._probe()
        if facts["machine"].lower() not in MACHINES:
            raise DeviceError(
                f"{self._host} is {facts['machine']}; the engines need a 64-bit system ({', '.join(MACHINES)}): "
                "install a 64-bit operating system"
            )
        version = facts["python"]
        if not version or tuple(map(int, version.split("."))) < (3, 11):
            raise DeviceError(
                f"{self._host}: {self._options.board_python} is {version or 'missing or has no venv module'}; "
                "install Python 3.11 or newer (apt install python3 python3-venv) or name it with --board-python"
            )
        free_ram, free_disk = 1024 * int(facts["free_ram_kb"] or 0), 1024 * int(facts["free_disk_kb"] or 0)
        require_room(artefacts, options, max(free_disk - ENVIRONMENT_BYTES, 1), free_ram, self._host)
        for artefact in artefacts:
            self._copy(artefact)
        with tempfile.TemporaryDirectory() as scratch:
            requirement = runtime_requirement(self._options.wheel, Path(scratch), self._say)
            for engine in dict.fromkeys(artefact.engine for artefact in artefacts):
                self._environments[engine] = self._environment(engine, requirement)

    def temperature_celsius(self) -> float | None:
        return temperature_celsius(RemoteShell(self._run))

    def measure(self, artefact: Artefact, options: BenchOptions) -> Measurement:
        path = self._remote_path(artefact, artefact.path)
        request = measure.Request(str(path), request_context(artefact, options), asdict(options))
        python = f"{self._environments[artefact.engine]}/bin/python"
        answer = self._run(f"{python} -m {measure.__name__} {shlex.quote(json.dumps(asdict(request)))}")
        return parse_measurement(f"{self._host}: {artefact.path}", answer)

    def close(self) -> None:
        try:
            if self._options.clean_up and self._facts:
                self._run(f"rm -rf {FOLDER}")
        finally:
            with contextlib.suppress(DeviceError):  # without ssh there is no connection to end
                run_program([*self._ssh, "-O", "exit", self._host])
            self._sockets.cleanup()

    def _run(self, line: str, stdin: int = subprocess.DEVNULL) -> Finished:
        """Run a line of shell in the home folder; DeviceError where the board cannot be reached (any more)."""
        command = [*self._ssh, self._host, "--", f"sh -c {shlex.quote(line)}"]
        answer = run_program(command, stdin=stdin)
        # half a stream cannot be sent again as it is, and a host that never answered will not answer now
        tries = ATTEMPTS if stdin == subprocess.DEVNULL and self._facts else 1
        for attempt in range(1, tries):
            if answer.code != DROPPED:
                break
            self._say(f"{self._host}: {answer.last_error}; trying again ({attempt + 1}/{ATTEMPTS})")
            answer = run_program(command, stdin=stdin)
        if answer.code == DROPPED:
            raise DeviceError(f"{self._host} cannot be reached: {answer.last_error}; try: ssh {self._host}")
        return answer

    def _probe(self) -> dict[str, str]:
        if not self._facts:
            answer = self._run(PROBE.replace("PYTHON", shlex.quote(self._options.board_python)))
            pairs = (line.partition("=") for line in answer.output.splitlines())
            self._facts = {name: value.strip() for name, _, value in pairs}
            if "machine" not in self._facts:
                raise DeviceError(f"{self._host} gave no usable answer: {answer.last_error}")
        return self._facts

    def _remote_path(self, artefact: Artefact, file: Path) -> PurePosixPath:
        """Where a file of the artefact, or its folder, lies on the board."""
        folder = PurePosixPath(FOLDER) / "artefacts" / artefact.sha256[:32]
        return folder / file.relative_to(artefact.folder).as_posix()

    def _copy(self, artefact: Artefact) -> None:
        """Copy the files whose hash differs there. An interrupted file stays as NAME.part and is gone on with."""
        for file in artefact.files:
            self._copy_file(file, self._remote_path(artefact, file))

    def _copy_file(self, file: Path, target: PurePosixPath) -> None:
        digest, size, quoted = sha256_of(file), file.stat().st_size, shlex.quote(str(target))
        if self._remote_sha256(quoted) == digest:
            return
        part = shlex.quote(f"{target}.part")
        self._require(f"mkdir -p {shlex.quote(str(target.parent))}")
        for attempt in range(ATTEMPTS):
            copied = int(self._run(f"wc -c < {part} 2>/dev/null || echo 0").output.split()[-1])
            if copied > size:
                self._require(f"rm -f {part}")
                copied = 0
            self._say(f"copying {file.name}" + (f" from byte {copied:,} on" if copied else ""))
            try:
                with file.open("rb", buffering=0) as stream:
                    os.lseek(stream.fileno(), copied, os.SEEK_SET)
                    self._run(f"cat >> {part}", stdin=stream.fileno())
            except DeviceError:
                if attempt == ATTEMPTS - 1:
                    raise
                continue
            if self._remote_sha256(part) == digest:
                self._require(f"mv {part} {quoted}")
                return
            self._require(f"rm -f {part}")  # complete, but not what was sent
        raise DeviceError(f"{file} arrived damaged {ATTEMPTS} times; check the board's disk (dmesg) and run again")

    def _remote_sha256(self, quoted: str) -> str:
        answer = self._run(f"sha256sum {quoted} 2>/dev/null")
        found = re.match(r"\\?([0-9a-f]{64})", answer.output)
        return found[1] if found else ""

    def _require(self, line: str) -> None:
        answer = self._run(line)
        if answer.code != 0:
            raise DeviceError(f"{self._host}: {answer.last_error}")

    def _environment(self, engine: str, requirement: Requirement) -> str:
        """Folder of the environment with this release and `engine`, made where it is not complete."""
        if engine not in EXTRAS:
            raise DeviceError(f"engine {engine!r} is a plug-in's; boards run {', '.join(EXTRAS)}")
        extra = EXTRAS[engine]
        folder = f"{FOLDER}/env-{extra}-{requirement.key}"
        if self._run(f"test -f {folder}/complete").code == 0:
            return folder
        self._say(f"installing efficientllm[{extra}] on {self._host}; this may take minutes")
        source = requirement.specifier.format(extra=extra)
        self._require(f"rm -rf {folder} && {shlex.quote(self._options.board_python)} -m venv {folder}")
        if requirement.wheel:
            target = PurePosixPath(folder) / requirement.wheel.name
            self._copy_file(requirement.wheel, target)
            source = f"$HOME/{target}[{extra}]"
        answer = self._run(f'{folder}/bin/python -m pip install --quiet "{source}"')
        if answer.code != 0:
            raise DeviceError(
                f"{self._host}: pip install failed: {answer.last_error}; an engine without a wheel for the board is "
                "compiled there: apt install build-essential cmake python3-dev"
            )
        self._require(f"touch {folder}/complete")
        return folder
