"""The distribution a board installs: this source tree's wheel, or what is installed here, packed again."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
import zipfile
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
