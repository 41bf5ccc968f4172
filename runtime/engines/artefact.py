"""An exported model as it lies on this machine: its engine, its files and what identifies it."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import ArtefactError
from ..base.files import sha256_of
from .manifest import GENAI_CONFIG, MANIFEST_NAME, GenaiConfig, Manifest, once

FILE_ENGINES = {".gguf": "llama.cpp", ".pte": "executorch"}
"""Suffix of a bare model file -> its engine."""


@dataclass(frozen=True)
class Artefact:
    """A folder with a manifest or of onnxruntime-genai's own builder, or a bare file."""

    path: Path
    """As the user gave it; the folder where that was its manifest."""
    engine: str
    model_file: Path
    """What the engine opens."""
    files: tuple[Path, ...]
    """Every file that running it needs, the manifest among them."""
    manifest: Manifest | None

    @classmethod
    def open(cls, path: str | Path) -> Artefact:
        """ArtefactError where `path` is none or a file is missing or truncated; no weight is read (see `verify`)."""
        path = Path(path)
        if path.name == MANIFEST_NAME and path.is_file():
            path = path.parent
        if path.is_dir():
            has_manifest = (path / MANIFEST_NAME).exists() or not (path / GENAI_CONFIG).is_file()
            return cls._open_folder(path) if has_manifest else cls._open_genai_folder(path)
        remedy = "give a folder written by efficientllm-export, or a .gguf or .pte file"
        if not path.exists():
            raise ArtefactError(f"{path} does not exist; {remedy}")
        if path.suffix not in FILE_ENGINES:
            raise ArtefactError(f"{path} is no artefact: {remedy}")
        return cls(path, FILE_ENGINES[path.suffix], path, (path,), None)

    @classmethod
    def _open_folder(cls, folder: Path) -> Artefact:
        manifest = Manifest.read(folder)
        manifest.check_files(folder)
        files = (*(folder / name for name in sorted(manifest.files)), folder / MANIFEST_NAME)
        return cls(folder, manifest.engine, folder / manifest.model_file, files, manifest)

    @classmethod
    def _open_genai_folder(cls, folder: Path) -> Artefact:
        config = GenaiConfig.read(folder)
        if not config.model_file:
            raise ArtefactError(f"{folder / GENAI_CONFIG} names no decoder")
        files = tuple(sorted(path for path in folder.iterdir() if path.is_file()))
        return cls(folder, "onnxruntime", folder / config.model_file, files, None)

    @functools.cached_property
    def witness(self) -> Manifest | None:
        """The manifest that knows its files: its own, or the one of the folder that a bare file was exported into."""
        if self.manifest is not None or self.path != self.model_file:
            return self.manifest
        try:
            beside = Manifest.read(self.folder)
        except ArtefactError:  # anybody's
            return None
        return beside if beside.model_file == self.model_file.name else None

    def verify(self) -> None:
        """ArtefactError where a file is not the one that was exported; without a `witness` nothing is known of them.

        Reads every file once (about 1.5 s per GB) and remembers what it found until the file changes.
        """
        if self.witness is None:
            return
        self.witness.check_files(self.folder)
        for name, entry in self.witness.files.items():
            file = self.folder / name
            if once("sha256", [file], functools.partial(sha256_of, file)) != entry["sha256"]:
                raise ArtefactError(
                    f"{file} is damaged: its content is not what was exported; copy the folder or export it again"
                )

    @functools.cached_property
    def sha256(self) -> str:
        """Of the bare file, or of the list of files with their hashes, which are the manifest's where there is one."""
        if self.path == self.model_file:
            return sha256_of(self.path)
        if self.manifest is not None:
            hashes = {name: entry["sha256"] for name, entry in sorted(self.manifest.files.items())}
        else:
            hashes = {file.name: sha256_of(file) for file in self.files}
        listing = "".join(f"{name} {digest}\n" for name, digest in hashes.items())
        return hashlib.sha256(listing.encode()).hexdigest()

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

    def cache_bytes(self, slots: int, element_bytes: int) -> int:
        """Key/value caches of `slots` tokens; 0 where there is no manifest to say."""
        return self.manifest.cache_bytes(slots, element_bytes) if self.manifest else 0
