"""The distribution a board installs: this source tree's wheel, or the released one."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..runtime.base.child import run
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
    specifier: str
    """With {extra} for the engine's extra; unused where there is a wheel."""
    wheel: Path | None


def runtime_requirement(wheel: str, scratch: Path, say: Callable[[str], None]) -> Requirement:
    """The wheel the user named, else one built from the source tree into `scratch`, else this release by name."""
    if wheel:
        path = Path(wheel)
        if not path.is_file() or path.suffix != ".whl":
            raise UsageError(f"--wheel {wheel}: is no wheel file")
    elif (SOURCE / "pyproject.toml").is_file():
        say("building the wheel of this source tree")
        path = build_wheel(SOURCE, scratch)
    else:
        version = importlib.metadata.version("efficientllm")
        return Requirement(version, f"efficientllm[{{extra}}]=={version}", None)
    return Requirement(sha256_of(path)[:12], "", path)


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
