"""Copy wllama's npm packages (llama.cpp as WebAssembly), pinned, from npm or from given tarballs."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ...runtime.base.errors import ArtefactError, UsageError
from ...runtime.base.files import write_bytes_atomically
from ...runtime.base.user_cache import cache_folder
from .kernels import with_simd_kernels

VERSION = "3.13.0"
"""Version of both packages; its llama.cpp is b12211-7d7f028."""


@dataclass(frozen=True)
class NpmPackage:
    """A package of the npm registry and the files that the page needs."""

    name: str
    sha256: str
    """SHA-256 of the tarball, so that nothing else is ever copied."""
    files: dict[str, str]
    """Member of the tarball -> name in the exported folder."""

    @property
    def tarball(self) -> str:
        """Return the file name that `npm pack` gives it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{VERSION}.tgz"


WLLAMA = NpmPackage(
    "@wllama/wllama",
    "a9eaac205ff9a1d6fdbea395a48652bd5febc56511a7b66b736d862bf726d2d5",
    {
        "package/esm/index.min.js": "wllama.js",
        "package/esm/wasm/wllama.wasm": "wllama.wasm",
        "package/LICENCE": "wllama-LICENCE.txt",
    },
)
COMPAT = NpmPackage(
    "@wllama/wllama-compat",
    "4114beb68a61a0ab14ac3fe4416648b45d8a940e2e6aed5fe91eb6328ba6479d",
    {"package/wasm/wllama.js": "wllama-compat.js", "package/wasm/wllama.wasm": "wllama-compat.wasm"},
)
"""Package for browsers without JSPI or 64-bit memory (Safari), loaded only there. It has the same licence."""


def copy_wllama(folder: Path, given: str) -> list[str]:
    """Copy the runtime's files into `folder`, with SIMD kernels, and return their names.

    `given` is a folder with both tarballs of `npm pack`. If it is empty, npm is called once and the tarballs are kept
    in the user's cache. Raises UsageError if they are not available, ArtefactError if they are not the pinned ones.
    """
    names = []
    for package in (WLLAMA, COMPAT):
        tarball = _tarball(package, Path(given) if given else None)
        for member, name in package.files.items():
            content = _member(tarball, member)
            if name.endswith(".wasm"):
                content = with_simd_kernels(content, is_64=package is WLLAMA)
            (folder / name).write_bytes(content)
            names.append(name)
    return names


def _member(tarball: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
        source = archive.extractfile(name)
        if source is None:
            raise ArtefactError(f"wllama's tarball has no file {name}")
        return source.read()


def _tarball(package: NpmPackage, given: Path | None) -> bytes:
    """Return the pinned tarball's content."""
    path = (given or cache_folder() / "npm") / package.tarball
    if path.is_file():
        content = path.read_bytes()
        if _is_pinned(package, content):
            return content
        if given:
            raise ArtefactError(f"{path} is not {package.name}@{VERSION} that this release pins; fetch it again")
    if given:
        raise UsageError(f"--wllama {given}: has no {package.tarball}; run in it: npm pack {package.name}@{VERSION}")
    content = _npm_pack(package)
    if not _is_pinned(package, content):
        raise ArtefactError(f"npm returned another {package.name}@{VERSION} than this release pins")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(path, content)
    return content


def _is_pinned(package: NpmPackage, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == package.sha256


def _npm_pack(package: NpmPackage) -> bytes:
    """Run `npm pack` without scripts and return its download."""
    npm = shutil.which("npm")
    remedy = f"or give --wllama FOLDER with the tarballs of: npm pack {WLLAMA.name}@{VERSION} {COMPAT.name}@{VERSION}"
    if npm is None:
        raise UsageError(f"--target web needs npm, which is not installed: install Node.js, {remedy}")
    with tempfile.TemporaryDirectory() as folder:
        # without scripts: the pinned hash is checked only after the download
        command = [npm, "pack", "--silent", "--ignore-scripts", f"{package.name}@{VERSION}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        tarball = Path(folder) / package.tarball
        if done.returncode or not tarball.is_file():
            reason = next((line for line in done.stderr.splitlines() if line.strip()), "it gave no reason")
            raise UsageError(f"npm pack {package.name}@{VERSION} failed: {reason}; try again, {remedy}")
        return tarball.read_bytes()
