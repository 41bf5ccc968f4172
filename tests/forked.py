"""Processes that exports start to load and quantise a GGUF, forked from one that has imported llama.cpp.

A process of its own takes 0.3 s to import what it needs, and the suite starts hundreds.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

from efficientllm.runtime.base import child
from efficientllm.runtime.base.child import ProcessResult

LIBRARIES = ("numpy", "llama_cpp", "efficientllm.runtime.engines.llama_context", __name__)


def run_python(option: str, module: str, *arguments: str) -> ProcessResult:
    """Do what efficientllm.runtime.base.child.run_python does with ("-m", module, *arguments)."""
    if sys.platform == "win32":
        return child.run_python(option, module, *arguments)
    assert option == "-m"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(list(LIBRARIES))
    with tempfile.TemporaryDirectory() as name:
        output, errors = Path(name) / "output", Path(name) / "errors"
        process = server.Process(target=_run, args=(module, arguments, dict(os.environ), output, errors))
        process.start()
        process.join()
        return ProcessResult(process.exitcode or 0, output.read_text("utf-8"), errors.read_text("utf-8", "replace"))


def _run(module: str, arguments: tuple[str, ...], environment: dict[str, str], output: Path, errors: Path) -> None:
    for descriptor, file in ((1, output), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
