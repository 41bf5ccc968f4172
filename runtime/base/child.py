"""Running other programs to their end: what they printed, and the line that says why they failed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finished:
    """What a program left."""

    code: int
    """Exit code; -N where signal N killed it."""
    output: str
    errors: str

    @property
    def last_error(self) -> str:
        """The last line it printed, of stderr where there is any; the exit code of a silent program."""
        lines = [line.strip() for line in (self.errors.strip() or self.output).splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


def run(
    command: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    timeout: float | None = None,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
) -> Finished:
    """Run `command`, whatever its exit code; `timeout` in seconds.

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
    return Finished(done.returncode, done.stdout, done.stderr)


def run_python(*arguments: str, cwd: Path | str | None = None) -> Finished:
    """Run this Python with `arguments`, as ("-m", module, ...)."""
    return run([sys.executable, *arguments], cwd=cwd)
