"""Measurement on this machine, in child processes of this Python."""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..runtime.base.child import ProcessResult, run_python
from ..runtime.base.cpu_load import is_busy
from ..runtime.base.errors import ArtefactError
from ..runtime.engines.artefact import Artefact
from . import measure
from .device import DeviceOptions
from .emulation import EXECUTABLE_LINK, detect_emulator
from .results import BenchOptions, DeviceInfo, Measurement
from .sensors import LocalShell, temperature_celsius


def local_device_info(name: str) -> DeviceInfo:
    """Return a description of this machine, with empty fields for unreadable facts."""
    shell = LocalShell()
    models = [
        line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith(("model name", "Model"))
    ]
    memory = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    board = (shell.read("/proc/device-tree/model") or shell.read("/sys/class/dmi/id/product_name") or [""])[0]
    return DeviceInfo(
        name=name,
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        cpu=models[0] if models else platform.processor(),
        cores=os.cpu_count() or 1,
        ram_bytes=memory[0] if memory else 0,
        board=board,
        emulator=detect_emulator(shell, platform.machine(), executable_path()),
    )


def executable_path() -> str:
    """Return the executable that runs this Python, which is an emulator's under emulation. Returns "" outside Linux."""
    try:
        return os.readlink(EXECUTABLE_LINK)
    except OSError:
        return ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return []


class LocalDevice:
    """The local machine. Each measurement is a child process of this Python."""

    def __init__(self, options: DeviceOptions, log: Callable[[str], None]) -> None:
        self._log = log

    def describe(self) -> DeviceInfo:
        return local_device_info("local")

    def prepare(self, artefacts: list[Artefact], options: BenchOptions) -> None:
        if is_busy():
            self._log("other programs use this machine, so it seems slower than it is; stop them, or give --threads 1")

    def temperature_celsius(self) -> float | None:
        return temperature_celsius(LocalShell())

    def measure(self, artefact: Artefact, options: BenchOptions) -> Measurement:
        request = measure.Request(str(artefact.path), request_context(artefact, options), asdict(options))
        return parse_measurement(str(artefact.path), run_python("-m", measure.__name__, json.dumps(asdict(request))))

    def close(self) -> None:
        pass


def request_context(artefact: Artefact, options: BenchOptions) -> int:
    """Return the context to allocate in tokens: the need of the tests, up to the artefact's limit."""
    return min(options.context, artefact.context_length or options.context)


def parse_measurement(name: str, child: ProcessResult) -> Measurement:
    """Return the measurement that `child` printed. Raises ArtefactError with its last line if it failed."""
    number = -child.code if child.code < 0 else child.code - 128  # a shell reports a SIGKILL as 137
    names = {each.value: each.name for each in signal.Signals}
    if number == 9:  # SIGKILL, which Windows has no name for
        raise ArtefactError(f"{name}: the process was killed, probably because memory ran out; export a smaller type")
    if number in names:
        raise ArtefactError(f"{name}: the engine ended by {names[number]}; see efficientllm doctor")
    if child.code != 0:
        message = child.last_error.removeprefix("error: ")
        raise ArtefactError(message if name in message else f"{name}: {message}")
    return Measurement.from_json(json.loads(child.output.splitlines()[-1]))
