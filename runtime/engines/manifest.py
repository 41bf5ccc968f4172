"""The manifest that stands beside every exported artefact: what it is, where it came from, how well it matches.

genai_config.json: how onnxruntime-genai describes a model folder. Its builder writes it, our ONNX exporter too.

What this user's earlier processes found out about files, so that a second load does not ask again.

A finding is kept under the file's device, inode, size and times: whatever writes to the file changes one of them. The
cache is one JSON file; without it, or where it cannot be written, everything is found out anew.

What the engines say of how they were built: commits and instruction sets, for whoever compares figures.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from ..base.errors import ArtefactError
from ..base.files import json_text, sha256_of, write_json_atomically, write_text_atomically
from ..base.user_cache import cache_folder

MANIFEST_NAME = "manifest.json"
OLLAMA_FILE = "Modelfile"
"""Lies beside a GGUF, and is its owner's to change: none of the artefact's files."""
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, FORMAT_VERSION)
"""Version 1 had no hash of its own."""

NO_HASH = "0" * 64
"""Stands where the manifest's own hash goes while it is computed."""


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json; the artefact's folder holds it and the files it names."""

    engine: str
    """Runtime engine that loads the artefact: llama.cpp, onnxruntime or executorch."""
    model_file: str
    """Main file, relative to the manifest's folder."""
    files: dict[str, dict[str, Any]]
    """{relative name: {"bytes": int, "sha256": str}} of every file of the artefact but the manifest."""
    quantization: str
    """Weight type as the user named it: f32, q8_0, int4, ..."""
    bits_per_weight: float
    """Bits on disk of all tensors, divided by the model's parameters."""
    architecture: dict[str, Any]
    """Widths per layer (Architecture.to_dict) of the checkpoint."""
    context_length: int
    """Longest prompt and answer together, in tokens."""
    source: str
    """Checkpoint that was exported, as named by the user."""
    verification: dict[str, Any] = field(default_factory=dict)
    """Comparison with torch eager; empty with --no-verify."""
    training: dict[str, Any] = field(default_factory=dict)
    """The checkpoint's training.json: tokens and perplexities; empty for a model we did not train."""
    sampling: dict[str, float] = field(default_factory=dict)
    """How the model's maker samples from it: temperature, top_k, ... of the checkpoint's generation_config.json."""
    notes: tuple[str, ...] = ()
    """What the exporter changed or could not keep, as it was printed."""
    editable: dict[str, str] = field(default_factory=dict)
    """{relative name: SHA-256 as it was written} of files beside the artefact's that are their owner's to change."""
    format_version: int = FORMAT_VERSION

    @property
    def total_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())

    def cache_bytes(self, slots: int, element_bytes: int = 0) -> int:
        """Key/value caches of `slots` tokens; `element_bytes` 0: those of the artefact's activations."""
        heads, head_dim = self.architecture.get("num_key_value_heads", ()), self.architecture.get("head_dim", 0)
        return cache_bytes(slots, sum(heads), head_dim, element_bytes or (2 if self.quantization == "f16" else 4))

    def write(self, folder: Path) -> None:
        """Write FOLDER/manifest.json, which ends with the hash of its own text."""
        text = json_text(asdict(self) | {"format_version": FORMAT_VERSION, "sha256": NO_HASH}) + "\n"
        before, _, after = text.rpartition(NO_HASH)
        write_text_atomically(folder / MANIFEST_NAME, before + hashlib.sha256(text.encode()).hexdigest() + after)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read FOLDER/manifest.json; ArtefactError where it is missing, changed, foreign or newer than this release."""
        path = folder / MANIFEST_NAME
        try:
            data = path.read_bytes()
            values = json.loads(data)
        except FileNotFoundError as error:
            raise ArtefactError(
                f"{folder} holds no {MANIFEST_NAME}; give a folder written by efficientllm-export"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise ArtefactError(f"{path} cannot be read: {error}; export the model again") from error
        if not isinstance(values, dict) or values.get("format_version") not in READABLE_VERSIONS:
            raise ArtefactError(f"{path} is not a manifest of format {FORMAT_VERSION}; export the model again")
        if not _is_as_written(data, values):
            raise ArtefactError(f"{path} was changed after the export; export the model again")
        names = {item.name for item in fields(cls)}
        try:
            manifest = cls(**{name: value for name, value in values.items() if name in names})
            manifest._check_shape()
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ArtefactError(f"{path} is incomplete: {error}; export the model again") from error
        return manifest

    def _check_shape(self) -> None:
        """An exception where what loading reads is of another kind than this class says."""
        if self.model_file not in self.files:
            raise ValueError(f"model_file {self.model_file!r} is none of its files")
        for name, entry in self.files.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} lies outside the folder")
            if type(entry["bytes"]) is not int or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
                raise ValueError(f"files: {name!r} has no size and hash")
        if type(self.context_length) is not int or not isinstance(self.engine, str):
            raise ValueError("context_length is a number, engine a name")
        self.cache_bytes(1)
        if not all(isinstance(value, (int, float)) for value in self.sampling.values()):
            raise ValueError("sampling is numbers")
        if not all(isinstance(value, str) for value in self.editable.values()):
            raise ValueError("editable is names and hashes")

    def check_files(self, folder: Path) -> None:
        """ArtefactError where a file is missing or its size differs (a truncated copy); no content is read."""
        for name, entry in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ArtefactError(f"{path} is missing; copy the whole folder or export again")
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise ArtefactError(f"{path} has {size} bytes, not {entry['bytes']}; copy it again")


def _is_as_written(data: bytes, values: dict[str, Any]) -> bool:
    """Whether the text of a manifest is the one that its own hash was taken of."""
    digest = values.get("sha256")
    if digest is None:
        return values["format_version"] == 1
    text = data.replace(str(digest).encode(), NO_HASH.encode())
    return hashlib.sha256(text).hexdigest() == digest


def cache_bytes(slots: int, heads: int, head_dim: int, element_bytes: int) -> int:
    """Keys and values of `slots` tokens; `heads` counts the key/value heads of all layers, which may differ."""
    return 2 * element_bytes * slots * heads * head_dim


def manifest_cache_bytes(folder: Path, slots: int, element_bytes: int = 0) -> int:
    """`Manifest.cache_bytes` of the artefact in `folder`; 0 where there is no manifest of ours."""
    try:
        return Manifest.read(folder).cache_bytes(slots, element_bytes)
    except ArtefactError:
        return 0


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Sizes and hashes of an artefact's files, as Manifest.files."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}


GENAI_CONFIG = "genai_config.json"


@dataclass(frozen=True)
class GenaiConfig:
    """What the engines read of it; a folder without the file has the defaults."""

    model_file: str = ""
    context_length: int = 0
    """Tokens, prompt and answer together; 0 where it is not said."""
    vocab_size: int = 0
    end_ids: frozenset[int] = frozenset()
    """Tokens that end an answer."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """Sizes and names of the graph's inputs and outputs."""
    shares_cache: bool = True
    """Whether the attention operator writes into the past in place."""

    @classmethod
    def read(cls, folder: Path) -> GenaiConfig:
        """ArtefactError where FOLDER/genai_config.json is there and malformed."""
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
            raise ArtefactError(f"{path} is malformed: {error}") from error


LARGEST = 1000
"""Findings that are kept; the oldest go first."""

SETTLED_SECONDS = 2.0
"""A file changed less than this ago could change again within one tick of its clock: nothing is kept of it."""


def once(
    question: str, files: Sequence[Path], find_out: Callable[[], str], is_answer: Callable[[str], bool] = bool
) -> str:
    """The answer to `question` about the content of `files`: the kept one, or `find_out()`, which is kept then.

    An empty answer is not kept, nor is what `find_out` raises; a kept one that is none (`is_answer`) is found anew.
    """
    before = _identity(files)
    key = f"{question}: {before}"
    path = cache_folder() / "seen.json"
    kept = _read(path).get(key)
    if kept is not None and is_answer(kept):
        return kept
    answer = find_out()
    changed = max(max(state.st_mtime, state.st_ctime) for state in map(Path.stat, files))
    if answer and time.time() - changed > SETTLED_SECONDS and _identity(files) == before:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            answers = [*_read(path).items(), (key, answer)][-LARGEST:]
            write_json_atomically(path, dict(answers))
    return answer


def _identity(files: Sequence[Path]) -> str:
    """Numbers that change with the content; a list of many files is one hash."""
    states = [file.stat() for file in files]
    numbers = [(one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in states]
    return hashlib.sha256(repr(numbers).encode()).hexdigest()


def _read(path: Path) -> dict[str, str]:
    """The findings; none where there is no such file or it is damaged."""
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return answers if isinstance(answers, dict) and all(isinstance(one, str) for one in answers.values()) else {}


def _llama_cpp() -> str:
    import llama_cpp

    said = [llama_cpp.llama_print_system_info().decode().strip(" |")]
    for what in ("version", "commit"):
        # ggml says both itself, the Python package neither; builds of before 2025 do not
        ask = getattr(llama_cpp.llama_cpp._lib, f"ggml_{what}", None)
        if ask is not None:
            ask.restype = ctypes.c_char_p
            said.append(f"ggml {what} {ask().decode()}")
    return " | ".join(said)


def _onnxruntime() -> str:
    import onnxruntime

    return onnxruntime.get_build_info()


def _executorch() -> str:
    from executorch import version

    return f"commit {version.git_version}"


BUILDS = {"llama.cpp": _llama_cpp, "onnxruntime": _onnxruntime, "executorch": _executorch}


def engine_build(name: str) -> str:
    """Of an installed engine; "" of one that tells nothing (onnxruntime-genai, a plug-in's)."""
    return BUILDS[name]() if name in BUILDS else ""
