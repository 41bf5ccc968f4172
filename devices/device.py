"""The interface of a measured device, and the options that select one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..runtime.base import flags
from ..runtime.base.errors import UsageError
from ..runtime.engines.artefact import Artefact
from .results import BenchOptions, DeviceInfo, Measurement


class Device(Protocol):
    """A machine that measures artefacts. Each method raises a DeviceError of one line with the remedy."""

    def describe(self) -> DeviceInfo:
        """Return the device's description, which is part of the key that identifies an interrupted run."""
        ...

    def prepare(self, artefacts: list[Artefact], options: BenchOptions) -> None:
        """Check that the device can run the artefacts, and copy the missing files."""
        ...

    def temperature_celsius(self) -> float | None:
        """Return the temperature of the hottest zone, of a phone its battery's. Returns None without a sensor."""
        ...

    def measure(self, artefact: Artefact, options: BenchOptions) -> Measurement:
        """Run each test `options.repetitions` times in a new process, after one warm-up repetition."""
        ...

    def close(self) -> None:
        """Close connections. Copied files stay unless the user asked for clean-up."""
        ...


@dataclass(frozen=True)
class DeviceOptions:
    """Device."""

    device: str = "local"
    """Device to measure on: local, ssh://USER@HOST[:PORT], or adb[:SERIAL]."""
    runner: str = ""
    """Program to run on an Android phone: llama-bench (see `make android-runner`)."""
    wheel: str = ""
    """Wheel of efficientllm for a board; default: built from this source tree."""
    engine_wheels: str = ""
    """Folder with a llama-cpp-python wheel for 64-bit ARM boards, which PyPI does not offer (see `make board-wheel`);
    default: build/board-wheel if it exists."""
    board_python: str = "python3"
    """Python 3.11 or newer on the board, used to create its environment."""
    ssh: str = "ssh"
    """OpenSSH client with its options, e.g. "ssh -F FILE -J JUMPHOST"."""
    clean_up: bool = False
    """Remove the copied files from the device afterwards."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        prefix = self.device.partition(":")[0]
        flags.require(self, "runner", not self.runner or prefix == "adb", "is for phones; add --device adb")
        for name in ("wheel", "engine_wheels"):
            is_used = not getattr(self, name) or prefix == "ssh"
            flags.require(self, name, is_used, "is for boards; add --device ssh://USER@HOST")


DEVICE_CLASSES = {
    "local": "efficientllm.devices.local:LocalDevice",
    "ssh": "efficientllm.devices.ssh:SshDevice",
    "adb": "efficientllm.devices.adb:AdbDevice",
}
"""Maps the prefix of --device to "module:class"."""


def open_device(options: DeviceOptions, log: Callable[[str], None]) -> Device:
    """Return the device that --device names. Raises UsageError for an unknown prefix."""
    prefix, _, _ = options.device.partition(":")
    if prefix not in DEVICE_CLASSES:
        raise UsageError(f"--device {options.device!r} is unknown; use local, ssh://USER@HOST[:PORT] or adb[:SERIAL]")
    module, _, name = DEVICE_CLASSES[prefix].partition(":")
    return getattr(importlib.import_module(module), name)(options, log)
