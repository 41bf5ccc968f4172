"""Loading a file of unknown origin in a child process first: a damaged one can abort the process it is loaded in."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from ..base.child import Finished, run
from ..base.errors import ArtefactError
from .artefact import Artefact
from .manifest import once

WORKS = "works"
REFUSED = 3
"""Exit code where loading ended in a clear error, which the caller will get when it loads the file itself."""


def probe_once(artefact: Artefact, engine_version: str, options: Mapping[str, object]) -> None:
    """ArtefactError where a child process cannot load and run `artefact`; those that can are remembered.

    The child loads with `options` (fields of EngineOptions), as its parent will: what it measures is known to both.
    """

    def probe() -> str:
        done = run_probe([str(artefact.path), json.dumps(options)])
        if done.code not in (0, REFUSED):
            raise ArtefactError(complaint(artefact, done))
        return "" if done.code else WORKS

    once(f"{WORKS} in {artefact.engine} ({engine_version})", artefact.files, probe)


def run_probe(arguments: Sequence[str]) -> Finished:
    """The child, `probe_child`, to its end."""
    # ggml would start a debugger to print where it stopped
    return run(
        [sys.executable, "-m", f"{__package__}.probe_child", *arguments], env=os.environ | {"GGML_NO_BACKTRACE": "1"}
    )


def complaint(artefact: Artefact, done: Finished) -> str:
    """One line about a child that failed."""
    if done.code > 0:
        message = done.last_error.removeprefix("error: ")
        return message if str(artefact.path) in message else f"{artefact.path}: {message}"
    if -done.code == signal.SIGKILL:
        return f"{artefact.path}: the process that loaded it was killed, most likely for want of memory"
    try:
        name = signal.Signals(-done.code).name
    except ValueError:
        name = f"signal {-done.code}"
    return (
        f"{artefact.path} ends the process that loads it in {artefact.engine} ({name}): it is damaged, or made for "
        "another release; export it again"
    )
