"""An exported model on this machine: its engine, its files and its hashes."""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..base.errors import ArtefactError
from ..base.files import sha256_of
from ..base.ggml_types import FILE_TYPES, TENSOR_TYPES
from ..base.gguf_header import READ_ERRORS, read_header
from ..base.model_names import demo_source_path, may_be_hub_id, source_path
from .calibration import CONSTRAINTS, Calibration
from .file_cache import cached
from .manifest import MANIFEST_NAME, Manifest

GENAI_CONFIG = "genai_config.json"

FILE_ENGINES = {".gguf": "llama.cpp", ".pte": "executorch"}
"""Suffix of a bare model file -> its engine."""


ARTEFACT_HELP = "folder written by efficientllm-export, a .gguf or .pte file, or demo"
"""Help of the commands that run a model."""


@dataclass(frozen=True)
class GenaiConfig:
    """Fields of genai_config.json, the description of a model folder by onnxruntime-genai.

    Its builder and our ONNX exporter write the file. A folder without it has the defaults.
    """

    model_file: str = ""
    context_length: int = 0
    """Tokens of prompt and answer together; 0 if not stated."""
    vocab_size: int = 0
    end_ids: frozenset[int] = frozenset()
    """Tokens that end an answer."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """Sizes and names of the graph's inputs and outputs."""
    shares_cache: bool = True
    """The attention operator writes into the past in place."""

    @classmethod
    def read(cls, folder: Path) -> GenaiConfig:
        """Read FOLDER/genai_config.json. Raise ArtefactError if it is malformed."""
        path = folder / GENAI_CONFIG
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            model, search = values.get("model", {}), values.get("search", {})
            decoder, end_ids = model.get("decoder", {}), model.get("eos_token_id", [])
            return cls(
                decoder.get("filename", ""),
                int(model.get("context_length", 0)),
                int(model.get("vocab_size", 0)),
                frozenset(end_ids if isinstance(end_ids, list) else [end_ids]),
                decoder,
                search.get("past_present_share_buffer", True),
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ArtefactError(f"{path} is malformed: {error}; export the model again") from error


def _locate(path: Path) -> Path:
    """Return the path of the artefact at `path` or in it. Raise ArtefactError for a checkpoint or several models."""
    if path.name == MANIFEST_NAME and path.is_file():
        return path.parent
    if str(path) == "demo" and not path.exists():
        return demo_source_path()
    if not path.is_dir() or (path / MANIFEST_NAME).exists() or (path / GENAI_CONFIG).is_file():
        return path
    inside = [*sorted(path.glob("*.gguf")), *sorted(each.parent for each in path.glob(f"*/{MANIFEST_NAME}"))]
    if len(inside) > 1:
        raise ArtefactError(f"{path} has several models; name one: {', '.join(map(str, inside))}")
    if not inside and (source_path(str(path)) / "config.json").is_file():
        raise _not_exported(path, "is a checkpoint")
    return inside[0] if inside else path


def check_mark(path: Path) -> None:
    """Raise ArtefactError unless a .gguf or .pte file can be read and starts as one."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error}; check the file") from error
    if path.suffix == ".gguf" and not start.startswith(b"GGUF"):
        raise ArtefactError(f"{path} is not a GGUF file; give another file")
    if path.suffix == ".pte" and start[4:6] != b"ET":  # ExecuTorch's flat buffers are marked ET12 or similar
        raise ArtefactError(f"{path} is not a file of ExecuTorch; export it again")


class NotExportedError(ArtefactError):
    """A checkpoint where an exported model is needed."""

    def __init__(self, path: Path, problem: str) -> None:
        self.problem, self.output = f"{path} {problem}", f"{path.name}-gguf"
        self.arguments = ["export", str(path), "--target", "gguf", "--output", self.output]
        super().__init__(f"{self.problem}; export it first: {shlex.join(['efficientllm', *self.arguments])}")


def _not_exported(path: Path, problem: str) -> ArtefactError:
    error = NotExportedError(path, problem)
    found = Path(error.output, MANIFEST_NAME).is_file()
    return ArtefactError(f"{error.problem}; did you mean {error.output}?") if found else error


def open_or_export(path: str | Path) -> Artefact:
    """Return the artefact at `path`. In a terminal, a checkpoint is exported to a GGUF if the user agrees.

    Raise NotExportedError if the user declines.
    """
    try:
        return Artefact.open(path)
    except NotExportedError as error:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        print(f"{error.problem}; export it to {error.output} first? y/N ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise
        # a child, because the export needs torch, whose memory this process would keep
        done = subprocess.run([sys.executable, "-m", "efficientllm.runtime.start", *error.arguments])
        if done.returncode:
            sys.exit(done.returncode)
        return Artefact.open(error.output)


@dataclass(frozen=True)
class Artefact:
    """A folder with a manifest, a folder of onnxruntime-genai's own builder, or a bare model file."""

    path: Path
    """The path as the user gave it, or the folder of the manifest that the user gave."""
    engine: str
    model_file: Path
    """The file that the engine opens."""
    files: tuple[Path, ...]
    """All files that the engine needs, and the manifest."""
    manifest: Manifest | None

    @classmethod
    def open(cls, path: str | Path) -> Artefact:
        """Return the artefact at `path` without reading its weights, see `verify`.

        `path` may be demo, the built-in model, or a folder that holds one artefact.
        Raise ArtefactError if there is none, or a file is missing or truncated.
        """
        path = _locate(Path(path))
        if path.is_dir():
            has_manifest = (path / MANIFEST_NAME).exists() or not (path / GENAI_CONFIG).is_file()
            return cls._open_folder(path) if has_manifest else cls._open_genai_folder(path)
        remedy = "give a folder written by efficientllm-export, or a .gguf or .pte file"
        if not path.exists():
            if may_be_hub_id(str(path)):
                raise _not_exported(path, "does not exist")
            raise ArtefactError(f"{path} does not exist; {remedy}")
        if path.suffix not in FILE_ENGINES:
            raise ArtefactError(f"{path} is not an artefact; {remedy}")
        artefact = cls(path, FILE_ENGINES[path.suffix], path, (path,), None)
        if artefact.known_manifest is None:  # else its hash is compared
            check_mark(path)
        return artefact

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
            raise ArtefactError(f"{folder / GENAI_CONFIG} names no decoder file; export the model again")
        files = tuple(sorted(path for path in folder.iterdir() if path.is_file()))
        return cls(folder, "onnxruntime", folder / config.model_file, files, None)

    @functools.cached_property
    def known_manifest(self) -> Manifest | None:
        """Return the manifest that lists the files: the artefact's own, or the one in the folder of a bare file."""
        if self.manifest is not None or self.path != self.model_file:
            return self.manifest
        try:
            beside = Manifest.read(self.folder)
        except ArtefactError:  # a file of another program
            return None
        return beside if beside.model_file == self.model_file.name else None

    @functools.cached_property
    def calibrations(self) -> dict[tuple[str, str], Calibration]:
        """Return the calibrations by job and `tool_arguments`, each of the newest score with the most examples."""
        jobs = self.known_manifest.jobs if self.known_manifest is not None else ()
        scored = [job for job in jobs if "calibration" in job and job["constrain"] in CONSTRAINTS]
        found: dict[tuple[str, str], Calibration] = {}
        for job in sorted(scored, key=itemgetter("examples")):
            found[job.get("job", ""), CONSTRAINTS[job["constrain"]]] = Calibration(**job["calibration"])
        return found

    @property
    def job_names(self) -> tuple[str, ...]:
        """Return the names of the jobs that the model was trained on, if its examples have them."""
        return tuple(self.known_manifest.training.get("job_names", ())) if self.known_manifest is not None else ()

    def verify(self) -> None:
        """Raise ArtefactError if a file differs from the exported one. Without a `known_manifest`, nothing is checked.

        Every file is read once, at about 1.5 s per GB. The hash is cached until the file changes.
        """
        if self.known_manifest is None:
            return
        self.known_manifest.check_files(self.folder)  # sizes first, which are known without reading
        for name, entry in self.known_manifest.files.items():
            file = self.folder / name
            if cached("sha256", [file], functools.partial(sha256_of, file)) != entry["sha256"]:
                raise ArtefactError(
                    f"{file} is damaged: its content is not the exported one; copy the folder or export it again"
                )

    @functools.cached_property
    def sha256(self) -> str:
        """Return the hash of the bare file, or of the list of all files with their hashes."""
        if self.path == self.model_file:
            return sha256_of(self.path)
        if self.manifest is not None:
            hashes = {name: entry["sha256"] for name, entry in sorted(self.manifest.files.items())}
        else:
            hashes = {file.name: sha256_of(file) for file in self.files}
        listing = "".join(f"{name} {digest}\n" for name, digest in hashes.items())
        return hashlib.sha256(listing.encode()).hexdigest()

    @functools.cached_property
    def description(self) -> tuple[str, int, str]:
        """Return (family, number of parameters, weight type) by the manifest or a GGUF's header; "" or 0 if unknown."""
        if manifest := self.known_manifest:
            shape = manifest.architecture
            return shape.get("family", ""), shape.get("num_parameters", 0), manifest.quantization
        return describe_gguf(self.model_file)

    @property
    def folder(self) -> Path:
        """Return the folder that holds all files."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def file_bytes(self) -> int:
        """Return the size of all files."""
        return self.manifest.total_bytes if self.manifest else sum(file.stat().st_size for file in self.files)

    @property
    def context_length(self) -> int:
        """Return the tokens of prompt and answer together, 0 if unknown."""
        return self.manifest.context_length if self.manifest else 0

    def cache_bytes(self, slots: int, element_bytes: int) -> int:
        """Return the size of a KV cache of `slots` tokens, 0 without a manifest."""
        return self.manifest.cache_bytes(slots, element_bytes) if self.manifest else 0


def describe_gguf(path: Path) -> tuple[str, int, str]:
    """Return (family, number of parameters, weight type) from a GGUF's header, and ("", 0, "") for other files.

    A file without general.file_type has the type that most of its weights have.
    """
    try:
        header = read_header(path)
    except READ_ERRORS:
        return "", 0, ""
    weights_by_type: Counter[int] = Counter()
    for tensor in header.tensors:
        weights_by_type[tensor.kind] += tensor.num_elements
    if not weights_by_type:
        return "", 0, ""
    commonest = max(weights_by_type, key=weights_by_type.__getitem__)
    names = {number: name for name, number in FILE_TYPES.items()}
    of_tensor = next((name for name, each in TENSOR_TYPES.items() if each.number == commonest), "")
    kind = names.get(header.values.get("general.file_type", -1), of_tensor)
    return header.values.get("general.architecture", ""), weights_by_type.total(), kind
