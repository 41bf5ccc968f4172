"""Loading a file of unknown origin in a child process first: a damaged one can abort the process it is loaded in.

`python -m efficientllm.runtime.engines.probe PATH CONTEXT` loads it, evaluates a few tokens and says in one line what
is wrong.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import numpy as np

from ..base.child import Finished, run
from ..base.command import run_command
from ..base.errors import ArtefactError, EfficientLLMError
from .artefact import Artefact
from .seen import once

WORKS = "works"
REFUSED = 3
"""Exit code where loading ended in a clear error, which the caller will get when it loads the file itself."""

TEXT = "Hello"


def probe_once(artefact: Artefact, engine_version: str, context: int) -> None:
    """ArtefactError where a child process cannot load and run `artefact`; those that can are remembered."""

    def probe() -> str:
        done = run_probe([str(artefact.path), str(context)])
        if done.code not in (0, REFUSED):
            raise ArtefactError(complaint(artefact, done))
        return "" if done.code else WORKS

    once(f"{WORKS} in {artefact.engine} ({engine_version})", artefact.files, probe)


def run_probe(arguments: Sequence[str]) -> Finished:
    """This module as a program."""
    # ggml would start a debugger to print where it stopped
    return run([sys.executable, "-m", __spec__.name, *arguments], env=os.environ | {"GGML_NO_BACKTRACE": "1"})


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


def body(argv: Sequence[str]) -> int:
    from .engine import EngineOptions, load_engine

    path, context = argv
    artefact = Artefact.open(path)
    try:
        engine = load_engine(artefact, EngineOptions(threads=1, context=int(context), huge_pages=False), probe=False)
    except EfficientLLMError:
        return REFUSED
    tokens = engine.tokenize(TEXT, special=True)[:4] or [0]
    logits = np.stack([engine.prefill(tokens), engine.decode(tokens[-1])])
    if not np.isfinite(logits.max(axis=-1)).all():  # NaN, too
        raise ArtefactError(f"{artefact.path} computes no numbers; it is damaged, export it again")
    engine.token_bytes(int(logits[-1].argmax()))
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
