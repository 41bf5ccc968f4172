"""What a device does for the benchmark, and how --device names one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..runtime.base.errors import UsageError
from ..runtime.engines.artefact import Artefact
from .results import BenchOptions, DeviceInfo, Measurement


class Device(Protocol):
    """Where artefacts are measured. Every method raises DeviceError with one line that says what to do."""

    def describe(self) -> DeviceInfo:
        """What it is, asked once: part of the key under which an interrupted run is found again."""
        ...

    def prepare(self, artefacts: list[Artefact], options: BenchOptions) -> None:
        """Check that the device can take the artefacts, and bring there what is missing."""
        ...

    def temperature_celsius(self) -> float | None:
        """The hottest zone now, of a phone its battery; None where the device does not tell."""
        ...

    def measure(self, artefact: Artefact, options: BenchOptions) -> Measurement:
        """Every test, `options.repetitions` times after one that warms up, in a fresh process."""
        ...

    def close(self) -> None:
        """Let go of connections; what was copied stays unless the user asked for clean-up."""
        ...


@dataclass(frozen=True)
class DeviceOptions:
    """device"""

    device: str = "local"
    """Where to measure: local, ssh://USER@HOST[:PORT], or adb[:SERIAL]."""
    runner: str = ""
    """Program an Android phone runs: llama-bench (see `make android-runner`) or ExecuTorch's llama_main."""
    wheel: str = ""
    """efficientllm wheel for a board; default: built from this source tree, else what is installed here."""
    engine_wheels: str = ""
    """Folder of the llama-cpp-python wheel that a 64-bit ARM board installs, which PyPI does not have (see
    `make board-wheel`); default: build/board-wheel where there is one."""
    board_python: str = "python3"
    """Python, 3.11 or newer, that makes the board's environment."""
    ssh: str = "ssh"
    """OpenSSH client with its options, e.g. "ssh -F FILE -J JUMPHOST"."""
    clean_up: bool = False
    """Remove from the device what was copied there."""


KINDS = {
    "local": "efficientllm.devices.local:LocalDevice",
    "ssh": "efficientllm.devices.ssh:SshDevice",
    "adb": "efficientllm.devices.adb:AdbDevice",
}
"""What --device begins with -> "module:class"."""


def open_device(options: DeviceOptions, say: Callable[[str], None]) -> Device:
    """The device that --device names; UsageError where the name means nothing."""
    kind, _, _ = options.device.partition(":")
    if kind not in KINDS:
        raise UsageError(f"--device {options.device!r}: give local, ssh://USER@HOST[:PORT] or adb[:SERIAL]")
    module, _, attribute = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), attribute)(options, say)


def estimated_ram_bytes(artefact: Artefact, options: BenchOptions) -> int:
    """Weights, caches of 16-bit elements at the measured context, and a process with its buffers (0.2 GB)."""
    return artefact.file_bytes + artefact.cache_bytes(options.context, 2) + 200_000_000
