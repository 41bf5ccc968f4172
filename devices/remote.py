"""Functions shared by boards and phones: running commands, and checking disk and memory."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Sequence

from ..runtime.base.child import ProcessResult, run
from ..runtime.base.errors import DeviceError
from ..runtime.base.quantities import format_bytes
from ..runtime.engines.artefact import Artefact
from .results import BenchOptions

MARK = "--efficientllm--"
"""Line that separates the parts of a device's output."""
PROCESS_BYTES = 200_000_000
"""Memory of a process and its buffers, without weights and caches."""


def run_program(command: Sequence[str], timeout: float | None = None, stdin: int = subprocess.DEVNULL) -> ProcessResult:
    """Run a local program. Raises DeviceError if it is missing or takes longer than `timeout` seconds."""
    try:
        return run(command, timeout=timeout, stdin=stdin)
    except FileNotFoundError as error:
        raise DeviceError(f"{command[0]} is not installed or not on the PATH") from error
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{shlex.join(command[:3])} ... did not answer within {timeout:g} s") from error


class RemoteShell:
    """A `sensors.Shell` over `run`, which executes a shell command line on the device."""

    def __init__(self, run: Callable[[str], ProcessResult]) -> None:
        self._run = run

    def read(self, pattern: str) -> list[str]:
        answer = self._run(f'for f in {pattern}; do cat "$f" 2>/dev/null && echo {MARK}; done')
        return [text.strip("\0\n\r ") for text in answer.output.split(MARK)[:-1]]

    def run(self, command: Sequence[str]) -> str | None:
        answer = self._run(shlex.join(command))
        return answer.output if answer.code == 0 else None


def require_room(artefacts: list[Artefact], options: BenchOptions, free_disk: int, free_ram: int, name: str) -> None:
    """Raise DeviceError if the artefacts exceed the free disk or memory of device `name`.

    `free_disk` and `free_ram` are bytes. 0 means that the device does not report them.
    """
    needed = sum(artefact.file_bytes for artefact in artefacts)
    if free_disk and needed * 1.05 > free_disk:
        raise DeviceError(
            f"{name} has {format_bytes(free_disk)} of free disk, the artefacts need {format_bytes(needed)}; "
            "free some, or run again with fewer artefacts and --clean-up"
        )
    for artefact in artefacts:
        cache = artefact.cache_bytes(options.context, 2)  # of 16 bits, at the measured context
        memory = artefact.file_bytes + cache + PROCESS_BYTES
        if free_ram and memory > free_ram:
            raise DeviceError(
                f"{artefact.path} needs about {format_bytes(memory)} of memory, the device has "
                f"{format_bytes(free_ram)} available; close programs there or export a smaller type"
            )
