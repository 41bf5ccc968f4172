"""The Python environments of a board: this release and one engine, from wheels that are copied or that pip finds."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from ..runtime.base.child import ProcessResult, run
from ..runtime.base.errors import DeviceError, UsageError

SOURCE_ROOT = Path(__file__).resolve().parents[1]
"""Root of the source tree in an editable install, which may be a tree of links to it."""
REPRODUCIBLE_DATE = "946684800"
"""SOURCE_DATE_EPOCH of built wheels, so that equal sources give equal hashes."""
EXTRAS = {"llama.cpp": "gguf", "onnxruntime": "onnx", "executorch": "executorch"}
"""Maps an engine to the extra that installs it."""
ENVIRONMENT_BYTES = {"gguf": 600_000_000, "onnx": 600_000_000, "executorch": 2_500_000_000}
"""Upper limit of the disk space of an environment by extra. ExecuTorch's includes torch."""
COMPILED_PACKAGES = {"gguf": "llama_cpp_python"}
"""Maps an extra to its package without a wheel for 64-bit ARM on PyPI, which a board would have to compile."""
DEFAULT_WHEELS = SOURCE_ROOT / "build/board-wheel"
"""Output folder of `make board-wheel`."""


@dataclass(frozen=True)
class EngineWheel:
    """The wheel of a compiled package that a board installs."""

    path: Path
    required_features: tuple[str, ...]
    """Features in the board's /proc/cpuinfo without which the package crashes."""


class Board(Protocol):
    """The access to a board that `make_environment` needs."""

    @property
    def name(self) -> str: ...

    @property
    def facts(self) -> Mapping[str, str]:
        """Return the board's description. `features` are those of /proc/cpuinfo."""
        ...

    def run(self, line: str) -> ProcessResult:
        """Run a shell command line in the home folder."""
        ...

    def require(self, line: str) -> None:
        """Run a shell command line in the home folder. Raises DeviceError if it fails."""
        ...

    def copy(self, file: Path, target: PurePosixPath) -> None:
        """Copy a file to the board, unless it is there."""
        ...


def runtime_wheel(wheel: str, scratch: Path, log: Callable[[str], None]) -> Path:
    """Return the wheel that the user named, or build one in `scratch` from the source tree."""
    if wheel:
        path = Path(wheel)
        if not path.is_file() or path.suffix != ".whl":
            raise UsageError(f"--wheel {wheel} is not a wheel file; give a .whl file of efficientllm")
        return path
    if not (SOURCE_ROOT / "pyproject.toml").is_file():
        raise UsageError("--wheel is missing; run `pip wheel --no-deps .` in a clone of efficientllm and give its file")
    log("building the wheel of this source tree")
    return build_wheel(SOURCE_ROOT, scratch)


def build_wheel(source: Path, output: Path) -> Path:
    """Build a wheel in a copy of the tree."""
    # in the tree itself, setuptools would include stale files of its build folder
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "source"
        shutil.copytree(source, tree, ignore=shutil.ignore_patterns(".*", "build", "dist", "runs", "tests", "docs"))
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(output), str(tree)]
        finished = run(command, env=os.environ | {"SOURCE_DATE_EPOCH": REPRODUCIBLE_DATE})
    wheels = sorted(output.glob("*.whl"))
    if finished.code != 0 or not wheels:
        raise DeviceError(f"the wheel could not be built: {finished.last_error}; give one with --wheel")
    return wheels[0]


def engine_wheel(extra: str, facts: Mapping[str, str], folder: str) -> EngineWheel | None:
    """Return the compiled wheel for a board from `folder`, or from the output of `make board-wheel`.

    Returns None if pip can find the package, or if there is no wheel. Raises UsageError if a named `folder` has none.
    """
    package = COMPILED_PACKAGES.get(extra)
    if package is None or facts["machine"] != "aarch64" or not facts["system"].startswith("Linux"):
        return None
    wheels_path = Path(folder) if folder else DEFAULT_WHEELS
    wheels = sorted(wheels_path.glob(f"{package}-*_aarch64.whl"))
    if not wheels:
        if folder:
            raise UsageError(f"--engine-wheels {folder} contains no {package}-*_aarch64.whl; see: make board-wheel")
        return None
    needs_path = wheels_path / "needs"
    features = tuple(needs_path.read_text(encoding="utf-8").split()) if needs_path.is_file() else ()
    return EngineWheel(max(wheels, key=lambda wheel: wheel.stat().st_mtime), features)


def make_environment(
    board: Board, extra: str, wheel: Path, compiled: EngineWheel | None, python: str, folder: str
) -> None:
    """Create the environment `folder` with this release and `extra`. Raises DeviceError with pip's own reason."""
    if compiled is not None and (missing := set(compiled.required_features) - set(board.facts["features"].split())):
        raise DeviceError(
            f"{board.name}: its processor lacks {', '.join(sorted(missing))}, which {compiled.path.name} needs; build "
            "it for an older one: BOARD_CPU=cortex_a72 BOARD_NEEDS= make board-wheel"
        )
    board.require(f"rm -rf {folder} && {shlex.quote(python)} -m venv {folder}")
    remote = PurePosixPath(folder)
    board.copy(wheel, remote / wheel.name)
    packages = [f'"$HOME/{remote / wheel.name}[{extra}]"']
    if compiled is not None:
        board.copy(compiled.path, remote / compiled.path.name)
        packages.append(f'"$HOME/{remote / compiled.path.name}"')
    # The version check is disabled, because its notice would be the last line of each failure.
    pip = f"PIP_DISABLE_PIP_VERSION_CHECK=1 {folder}/bin/python -m pip"
    answer = board.run(f"{pip} install --quiet {' '.join(packages)}")
    if answer.code != 0:
        lines = [line for line in answer.errors.splitlines() if line.startswith("ERROR: ")] or [answer.last_error]
        raise DeviceError(
            f"{board.name}: pip install failed: {lines[-1].removeprefix('ERROR: ')}; an engine without a wheel for the "
            "board is compiled there (apt install build-essential cmake python3-dev), or here: make board-wheel"
        )
    board.require(f"touch {folder}/complete")
