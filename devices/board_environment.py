"""The Python environments of a board: this release and one engine, from wheels that are sent or that pip finds.

The distribution a board installs: this source tree's wheel, or what is installed here, packed again.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shlex
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from ..runtime.base.child import ProcessResult, run
from ..runtime.base.errors import DeviceError, UsageError
from ..runtime.base.files import sha256_of

SOURCE = Path(__file__).resolve().parents[1]
"""The source tree, where this is an editable install, which may link to it."""
REPRODUCIBLE_DATE = "946684800"
"""SOURCE_DATE_EPOCH of built wheels, so that the same source gives the same hash."""


@dataclass(frozen=True)
class Requirement:
    """What pip is asked for."""

    key: str
    """Changes whenever the distribution does."""
    wheel: Path


def runtime_requirement(wheel: str, scratch: Path, say: Callable[[str], None]) -> Requirement:
    """The wheel the user named, else one made in `scratch`: of the source tree, else of what is installed here."""
    if wheel:
        path = Path(wheel)
        if not path.is_file() or path.suffix != ".whl":
            raise UsageError(f"--wheel {wheel}: is no wheel file")
    elif (SOURCE / "pyproject.toml").is_file():
        say("building the wheel of this source tree")
        path = build_wheel(SOURCE, scratch)
    else:
        path = pack_installed(importlib.metadata.distribution("efficientllm"), scratch)
    return Requirement(sha256_of(path)[:12], path)


def build_wheel(source: Path, output: Path) -> Path:
    """Build in a copy: setuptools would pick up stale files of a build folder in the tree."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "source"
        shutil.copytree(source, tree, ignore=shutil.ignore_patterns(".*", "build", "dist", "runs", "tests", "docs"))
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(output), str(tree)]
        environment = os.environ | {"SOURCE_DATE_EPOCH": REPRODUCIBLE_DATE}
        done = run(command, env=environment)
    wheels = sorted(output.glob("*.whl"))
    if done.code != 0 or not wheels:
        raise DeviceError(f"the wheel could not be built: {done.last_error}")
    return wheels[0]


def pack_installed(distribution: importlib.metadata.Distribution, output: Path) -> Path:
    """The wheel that an installed distribution of pure Python came from, in the folder `output`.

    What the installation added (commands, bytecode, pip's own notes) is left out. The same files give the same wheel.
    """
    name, records = f"{distribution.name}-{distribution.version}", []
    added = {f"{name}.dist-info/{file}" for file in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")}
    wheel = output / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in sorted(distribution.files or [], key=str):
            if file.parts[0] != ".." and "__pycache__" not in file.parts and file.as_posix() not in added:
                content = Path(str(distribution.locate_file(file))).read_bytes()
                archive.writestr(_entry(file.as_posix()), content)
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                records.append(f"{file.as_posix()},sha256={digest},{len(content)}\n")
        record = f"{name}.dist-info/RECORD"
        archive.writestr(_entry(record), "".join([*records, f"{record},,\n"]))
    return wheel


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0))


EXTRAS = {"llama.cpp": "gguf", "onnxruntime": "onnx", "onnxruntime-genai": "genai", "executorch": "executorch"}
"""Engine -> the extra that brings it."""
ENVIRONMENT_BYTES = {"gguf": 600_000_000, "onnx": 600_000_000, "genai": 700_000_000, "executorch": 2_500_000_000}
"""Free disk that an environment with one extra needs at most; ExecuTorch's brings torch."""
COMPILED = {"gguf": "llama_cpp_python"}
"""Extra -> the package that PyPI has no wheel of for 64-bit ARM, so that a board compiles it unless it is sent."""
DEFAULT_WHEELS = SOURCE / "build/board-wheel"
"""Where `make board-wheel` leaves its wheel."""


class Board(Protocol):
    """What an environment is made through."""

    @property
    def name(self) -> str: ...

    @property
    def facts(self) -> Mapping[str, str]:
        """What it told of itself; `features` are those of /proc/cpuinfo."""
        ...

    def run(self, line: str) -> ProcessResult:
        """Run a line of shell in the home folder."""
        ...

    def require(self, line: str) -> None:
        """The same; DeviceError where it fails."""
        ...

    def copy(self, file: Path, target: PurePosixPath) -> None:
        """Copy a file there, unless it is there."""
        ...


@dataclass(frozen=True)
class EngineWheel:
    """A compiled package for a board."""

    wheel: Path
    needs: tuple[str, ...]
    """Features in the board's /proc/cpuinfo without which it would end at its first instruction."""


def engine_wheel(extra: str, facts: Mapping[str, str], folder: str) -> EngineWheel | None:
    """The wheel to send: of the folder that the user named, or of `make board-wheel`; None where pip will have to find
    one. UsageError where the named folder holds none."""
    package = COMPILED.get(extra)
    if package is None or facts["machine"] != "aarch64" or not facts["system"].startswith("Linux"):
        return None
    place = Path(folder) if folder else DEFAULT_WHEELS
    wheels = sorted(place.glob(f"{package}-*_aarch64.whl"))
    if not wheels:
        if folder:
            raise UsageError(f"--engine-wheels {folder}: holds no {package}-*_aarch64.whl; see: make board-wheel")
        return None
    needs = place / "needs"
    return EngineWheel(
        max(wheels, key=lambda wheel: wheel.stat().st_mtime),
        tuple(needs.read_text(encoding="utf-8").split()) if needs.is_file() else (),
    )


def make_environment(
    board: Board, extra: str, requirement: Requirement, sent: EngineWheel | None, python: str, folder: str
) -> None:
    """Make the environment `folder` of this release and `extra` on the board; DeviceError with pip's own reason."""
    if sent is not None and (lacking := set(sent.needs) - set(board.facts["features"].split())):
        raise DeviceError(
            f"{board.name}: its processor lacks {', '.join(sorted(lacking))}, which {sent.wheel.name} needs; build it "
            "for an older one: BOARD_CPU=cortex_a72 BOARD_NEEDS= make board-wheel"
        )
    board.require(f"rm -rf {folder} && {shlex.quote(python)} -m venv {folder}")
    place = PurePosixPath(folder)
    board.copy(requirement.wheel, place / requirement.wheel.name)
    asked = [f'"$HOME/{place / requirement.wheel.name}[{extra}]"']
    if sent is not None:
        board.copy(sent.wheel, place / sent.wheel.name)
        asked.append(f'"$HOME/{place / sent.wheel.name}"')
    # without the notice of a newer pip, which would be the last line of every failure
    pip = f"PIP_DISABLE_PIP_VERSION_CHECK=1 {folder}/bin/python -m pip"
    answer = board.run(f"{pip} install --quiet {' '.join(asked)}")
    if answer.code != 0:
        lines = [line for line in answer.errors.splitlines() if line.startswith("ERROR: ")] or [answer.last_error]
        raise DeviceError(
            f"{board.name}: pip install failed: {lines[-1].removeprefix('ERROR: ')}; an engine without a wheel for the "
            "board is compiled there (apt install build-essential cmake python3-dev), or here: make board-wheel"
        )
    board.require(f"touch {folder}/complete")
