"""An exported model as it lies on this machine: its files and what identifies it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..base.files import sha256_of
from .engine import locate
from .manifest import MANIFEST_NAME, Manifest


@dataclass(frozen=True)
class Artefact:
    """A folder with a manifest or of onnxruntime-genai's own builder, or a bare file."""

    path: Path
    """As the user gave it."""
    engine: str
    files: tuple[Path, ...]
    """Every file that running it needs, the manifest among them."""
    sha256: str
    """Of the bare file, or of the list of files with their hashes, which are the manifest's where there is one."""
    manifest: Manifest | None

    @property
    def folder(self) -> Path:
        """What holds all its files."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def file_bytes(self) -> int:
        return self.manifest.total_bytes if self.manifest else sum(file.stat().st_size for file in self.files)

    @property
    def context_length(self) -> int:
        """0 where it is not known."""
        return self.manifest.context_length if self.manifest else 0

    @classmethod
    def open(cls, path: Path) -> Artefact:
        """ArtefactError where `path` is none."""
        engine, file = locate(path)
        folder = path.parent if path.name == MANIFEST_NAME else path
        if not folder.is_dir():
            return cls(path, engine, (file,), sha256_of(file), None)
        if (folder / MANIFEST_NAME).exists():
            manifest = Manifest.read(folder)
            hashes = {name: entry["sha256"] for name, entry in sorted(manifest.files.items())}
            files = (*(folder / name for name in hashes), folder / MANIFEST_NAME)
        else:  # of onnxruntime-genai's own builder
            manifest, files = None, tuple(sorted(path for path in folder.iterdir() if path.is_file()))
            hashes = {path.name: sha256_of(path) for path in files}
        listing = "".join(f"{name} {digest}\n" for name, digest in hashes.items())
        return cls(folder, engine, files, hashlib.sha256(listing.encode()).hexdigest(), manifest)
