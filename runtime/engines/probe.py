"""Load a file of unknown origin in a child process first, because a damaged file can abort the process."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from ..base.child import ProcessResult, run
from ..base.errors import ArtefactError
from .artefact import Artefact
from .file_cache import cached

WORKS = "works"
REFUSED = 3
"""Exit code of the child after a clear error of loading, which the parent gets when it loads the file itself."""


def probe_artefact(artefact: Artefact, engine_version: str, options: Mapping[str, object]) -> None:
    """Raise ArtefactError if a child process cannot load and run `artefact`. A success is cached.

    The child loads with `options`, fields of EngineOptions.
    """

    def try_loading() -> str:
        done = run_probe([str(artefact.path), json.dumps(options)])
        if done.code not in (0, REFUSED):
            raise ArtefactError(_describe_failure(artefact, done))
        return "" if done.code else WORKS

    cached(f"{WORKS} in {artefact.engine} ({engine_version})", artefact.files, try_loading)


def run_probe(arguments: Sequence[str]) -> ProcessResult:
    """Run the module `probe_child` to its end."""
    command = [sys.executable, "-m", f"{__package__}.probe_child", *arguments]
    # Without the variable, ggml starts a debugger to print a backtrace when it aborts.
    return run(command, env=os.environ | {"GGML_NO_BACKTRACE": "1"})


def _describe_failure(artefact: Artefact, done: ProcessResult) -> str:
    """Return an error message of one line for a child that failed."""
    if done.code > 0:
        message = done.last_error.removeprefix("error: ")
        return message if str(artefact.path) in message else f"{artefact.path}: {message}"
    if -done.code == signal.SIGKILL:
        return f"{artefact.path}: the process that loaded it was killed, most likely for lack of memory; free some"
    try:
        name = signal.Signals(-done.code).name
    except ValueError:
        name = f"signal {-done.code}"
    return (
        f"{artefact.path} ends the process that loads it in {artefact.engine} ({name}): it is damaged, or made for "
        "another release; export it again"
    )
