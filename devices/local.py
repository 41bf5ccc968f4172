"""This machine: a laptop, or a board one is logged in to."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..runtime.base.child import ProcessResult, run_python
from ..runtime.base.errors import ArtefactError
from ..runtime.engines.artefact import Artefact
from . import measure
from .device import DeviceOptions
from .emulation import RUNNING_PROGRAM, look_up, recognise
from .results import BenchOptions, DeviceInfo, Measurement
from .sensors import LocalShell, temperature_celsius


def local_device_info(name: str) -> DeviceInfo:
    """What this machine is, as far as it tells; a board runs this too."""
    shell = LocalShell()
    models = [
        line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith(("model name", "Model"))
    ]
    memory = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    board = (shell.read("/proc/device-tree/model") or shell.read("/sys/class/dmi/id/product_name") or [""])[0]
    layer = recognise(shell, platform.machine(), running_program())
    return DeviceInfo(
        name=name,
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        cpu=models[0] if models else platform.processor(),
        cores=os.cpu_count() or 1,
        ram_bytes=memory[0] if memory else 0,
        board=board,
        known=look_up(board),
        virtual=layer.name,
        emulated=layer.translates,
    )


def running_program() -> str:
    """The executable that runs this Python, an emulator's where there is one; "" where the system is not Linux."""
    try:
        return os.readlink(RUNNING_PROGRAM)
    except OSError:
        return ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return []


class LocalDevice:
    """Measures in child processes of this Python."""

    def __init__(self, options: DeviceOptions, say: Callable[[str], None]) -> None:
        pass

    def describe(self) -> DeviceInfo:
        return local_device_info("local")

    def prepare(self, artefacts: list[Artefact], options: BenchOptions) -> None:
        pass

    def temperature_celsius(self) -> float | None:
        return temperature_celsius(LocalShell())

    def measure(self, artefact: Artefact, options: BenchOptions) -> Measurement:
        request = measure.Request(str(artefact.path), request_context(artefact, options), asdict(options))
        return parse_measurement(str(artefact.path), run_python("-m", measure.__name__, json.dumps(asdict(request))))

    def close(self) -> None:
        pass


def request_context(artefact: Artefact, options: BenchOptions) -> int:
    """The window to allocate: what the tests need, at most what the artefact holds."""
    return min(options.context, artefact.context_length or options.context)


def parse_measurement(name: str, child: ProcessResult) -> Measurement:
    """The measurement that `child` printed; ArtefactError with its last line where it failed."""
    if child.code in (-9, 137):  # 137 is what a shell makes of it
        raise ArtefactError(f"{name}: the process was killed, most likely for want of memory")
    if child.code != 0:
        message = child.last_error.removeprefix("error: ")
        raise ArtefactError(message if name in message else f"{name}: {message}")
    return Measurement.from_json(json.loads(child.output.splitlines()[-1]))
