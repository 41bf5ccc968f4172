"""Run other programs to their end and keep their output."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessResult:
    """The result of a program."""

    code: int
    """Exit code, or -N if signal N ended the program."""
    output: str
    errors: str

    @property
    def last_error(self) -> str:
        """Return the last line of stderr, of stdout if stderr is empty, or the exit code of a silent program."""
        text = self.errors.strip() or self.output
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


def run(
    command: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    timeout: float | None = None,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
) -> ProcessResult:
    """Run `command` and return its result, whatever its exit code. `timeout` is in seconds.

    Raises FileNotFoundError and subprocess.TimeoutExpired as subprocess.run does.
    """
    done = subprocess.run(
        command,
        stdin=stdin,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=timeout,
        cwd=cwd,
        env=env,
    )
    return ProcessResult(done.returncode, done.stdout, done.stderr)


def run_python(*arguments: str, cwd: Path | str | None = None, timeout: float | None = None) -> ProcessResult:
    """Run this Python with `arguments`, such as ("-m", module). `timeout` is that of `run`."""
    return run([sys.executable, *arguments], cwd=cwd, timeout=timeout)
