"""The Python environments of a board: this release and one engine, from wheels that are sent or that pip finds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from ..runtime.base.child import Finished
from ..runtime.base.errors import DeviceError, UsageError
from .wheel import SOURCE, Requirement

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

    def run(self, line: str) -> Finished:
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
