"""The engine on the llama.cpp of the binary wheel xllamacpp, in a process without llama-cpp-python."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from efficientllm.runtime.base.errors import MissingExtraError, UsageError
from efficientllm.runtime.engines import llama_library

ANSWER = """
import json, sys

sys.modules |= dict.fromkeys(json.loads(sys.argv[2]))  # None: as if it were not installed
from efficientllm.runtime.engines.engine import EngineOptions, engine_build, engine_version
from efficientllm.runtime.engines.llama_cpp import LlamaCppEngine
from efficientllm.runtime.engines.llama_library import load_llama
from efficientllm.runtime.engines.protocol import Chunk, EvaluationInterrupted
from pathlib import Path

options = EngineOptions(threads=1, tune=False, context=256, parallel=2, memory_map=True)
engine = LlamaCppEngine(Path(sys.argv[1]), options)
tokens = engine.tokenize("Hello there, said the sea.", special=True)
first = engine.extend([Chunk(0, tokens)])[0]
engine.copy(0, 1, len(tokens) - 2)
again = engine.extend([Chunk(1, tokens[-2:])])[0]
state = engine.sequence_state(1)
engine.truncate(1, 0)
restored = engine.restore_sequence(1, state, len(tokens))
after = engine.extend([Chunk(1, tokens[:3])])[0]
engine.interrupt()
try:
    engine.extend([Chunk(0, tokens)])
    interrupted = False
except EvaluationInterrupted:
    interrupted = True
engine.resume()
parameters = [getattr(load_llama(), f"llama_{kind}_default_params")() for kind in ("model", "context")]
values = {name: getattr(each, name) for each in parameters for name, *_ in each._fields_}
print(json.dumps({
    "version": engine_version("llama.cpp"),
    "build": engine_build("llama.cpp"),
    "tokens": tokens,
    "bytes": [list(engine.token_bytes(token)) for token in tokens],
    "texts": [engine.chat_template, engine.bos_token, engine.eos_token, sorted(engine.control_texts)],
    "numbers": [engine.adds_bos, sorted(engine.end_ids), engine.vocab_size, engine.kv_cache_bytes],
    "logits": [each.tolist() for each in (first, again, after)],
    "embedding": engine.embed(tokens, "mean").tolist(),
    "restored": restored,
    "interrupted": interrupted,
    "defaults": {name: value for name, value in values.items() if isinstance(value, bool | int | float)},
}))
engine.close()
"""


def answer(path: Path, *absent: str) -> dict[str, Any]:
    command = [sys.executable, "-c", ANSWER, str(path), json.dumps(absent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_the_binary_wheel_answers_as_llama_cpp_python(artefact: Path) -> None:
    """Other kernels: close logits. The same defaults: the structures have the fields where the library expects them."""
    binary, compiled = (answer(artefact / "model.gguf", *absent) for absent in (["llama_cpp"], []))
    assert binary.pop("version") == f"xllamacpp {llama_library.BINARY_VERSION}"
    assert compiled.pop("version").startswith("llama-cpp-python ")
    assert "ggml version" in binary.pop("build")
    assert "ggml version" in compiled.pop("build")
    for name in ("logits", "embedding"):
        np.testing.assert_allclose(binary.pop(name), compiled.pop(name), atol=2e-2)
    defaults = compiled.pop("defaults")
    assert {"kv_unified", "load_mtp", "n_samplers", "type_v"} <= defaults.keys()
    assert defaults.items() <= binary.pop("defaults").items()
    assert binary["restored"]
    assert binary["interrupted"]
    assert binary == compiled


def test_the_extra_installs_the_release_that_the_structures_describe() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    pin = f"xllamacpp=={llama_library.BINARY_VERSION}"
    (extra,) = project["project"]["optional-dependencies"]["gguf-binary"]
    assert extra == f"{pin}; sys_platform != 'win32'"
    assert pin in project["dependency-groups"]["test"]


def find_only(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return `load_llama` without its cache where `name` is the only llama.cpp, with its files in `folder`."""
    spec = SimpleNamespace(origin=str(folder / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda each: spec if each == name else None)
    return llama_library.load_llama.__wrapped__


@pytest.mark.parametrize(
    ("file", "version", "message"),
    [
        (
            "xllamacpp.abi3.so",
            "2026.9.1",
            r"xllamacpp 2026\.9\.1 is installed, not 2026\.\S+; run: pip install .*\[gguf-binary\]",
        ),
        ("xllamacpp.abi3.so", llama_library.BINARY_VERSION, r"xllamacpp cannot be loaded: .*file too short; run: pip "),
        (
            "other",
            llama_library.BINARY_VERSION,
            r"without its library; run: pip .* --force-reinstall .*\[gguf-binary\]",
        ),
    ],
)
def test_another_release_or_a_package_without_its_library_is_refused(
    file: str, version: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file).touch()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(UsageError, match=message):
        find_only("xllamacpp", tmp_path, monkeypatch)()


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ("fpu sse4_2 avx", "", r"xllamacpp needs AVX2, which this CPU lacks; run: pip install .*\[gguf\]"),
        (
            "fpu avx2",
            "libgomp.so.1: not found",
            r"libgomp\.so\.1: not found; install libgomp, .*libgomp1, or run: pip ",
        ),
    ],
)
def test_error_names_the_libraries_that_the_wheel_needs(
    flags: str, error: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xllamacpp.abi3.so").touch()
    (tmp_path / "cpuinfo").write_text(f"model name\t: Xeon\nflags\t\t: {flags}\n")
    monkeypatch.setattr(llama_library, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: llama_library.BINARY_VERSION)
    monkeypatch.setattr(ctypes, "CDLL", mock.Mock(side_effect=OSError(error)))
    with pytest.raises(UsageError, match=message):
        find_only("xllamacpp", tmp_path, monkeypatch)()


INTERRUPTED = """
import signal, sys, time
from pathlib import Path
from efficientllm.runtime.engines.engine import EngineOptions, load_engine

class Interrupted(BaseException): ...

def interrupt(*arguments):
    global was_sent
    was_sent = True
    raise Interrupted

options = EngineOptions(threads=1, tune=False, huge_pages=False)
signal.signal(signal.SIGALRM, interrupt)
load_engine(sys.argv[1], options).close()
began = time.perf_counter()
load_engine(sys.argv[1], options).close()
seconds, lost = time.perf_counter() - began, 0
for part in range(1, 40):
    was_sent = is_raised = False
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds * part / 40)
        load_engine(sys.argv[1], options).close()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        is_raised = True
    lost += was_sent and not is_raised
print("lost", lost)
"""


def test_a_signal_amid_loading_is_not_lost(artefact: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(artefact)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "lost 0\n", done.stdout + done.stderr[-2000:]
    assert "Exception ignored" not in done.stderr


def test_on_windows_the_extra_that_compiles_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(MissingExtraError, match=r"llama.cpp is not installed; run: pip install .*\[gguf\]"):
        find_only("xllamacpp", tmp_path, monkeypatch)()
