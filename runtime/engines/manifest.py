"""The manifest of an exported artefact: its engine, its files, its source and its verification."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from ..base.errors import ArtefactError
from ..base.files import json_text, sha256_of, write_text_atomically
from .calibration import Calibration

MANIFEST_NAME = "manifest.json"
JOB_FILE = "job.json"
"""File of a checkpoint with {"jobs": scores of jobs}, which exporters copy into the manifest."""
OLLAMA_FILE = "Modelfile"
"""File beside a GGUF that its owner may change. It does not count as a file of the artefact."""
FORMAT_VERSION = 2
"""Format version that can be read."""

NO_HASH = "0" * 64
"""Placeholder of the manifest's own hash while that is computed."""


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json, which is in the folder with the files that it lists."""

    engine: str
    """Runtime engine that loads the artefact: llama.cpp, onnxruntime or executorch."""
    model_file: str
    """Main file, relative to the manifest's folder."""
    files: dict[str, dict[str, Any]]
    """{relative name: {"bytes": int, "sha256": str}} of all files of the artefact except the manifest."""
    quantization: str
    """Weight type as the user named it: f32, q8_0, int4, ..."""
    bits_per_weight: float
    """Bits on disk of all tensors, divided by the model's parameters."""
    architecture: dict[str, Any]
    """Widths of each layer of the checkpoint (Architecture.to_dict)."""
    context_length: int
    """Tokens of prompt and answer together."""
    source: str
    """Checkpoint that was exported, as named by the user."""
    verification: dict[str, Any] = field(default_factory=dict)
    """Comparison with eager torch; empty with --no-verify."""
    training: dict[str, Any] = field(default_factory=dict)
    """The checkpoint's training.json with tokens and perplexities; empty for a model of others."""
    jobs: tuple[dict[str, Any], ...] = ()
    """Scores of jobs (train.evaluation.job_score), of the checkpoint and of these files."""
    sampling: dict[str, float] = field(default_factory=dict)
    """Sampling defaults of the model's maker: temperature, top_k, ... of the checkpoint's generation_config.json."""
    notes: tuple[str, ...] = ()
    """Printed notes of the exporter on changes and losses."""
    limits: tuple[str, ...] = ()
    """Statements of what differs from the checkpoint or was not verified."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """{stage: wall time in seconds} of the export."""
    editable: dict[str, str] = field(default_factory=dict)
    """{relative name: SHA-256 when written} of files in the folder that their owner may change."""
    format_version: int = FORMAT_VERSION

    @property
    def total_bytes(self) -> int:
        """Return the size of all files."""
        return sum(entry["bytes"] for entry in self.files.values())

    def cache_bytes(self, slots: int, element_bytes: int = 0) -> int:
        """Return the size of a KV cache of `slots` tokens. `element_bytes` 0 means the artefact's activation type."""
        heads, head_dim = self.architecture.get("num_key_value_heads", ()), self.architecture.get("head_dim", 0)
        return cache_bytes(slots, sum(heads), head_dim, element_bytes or (2 if self.quantization == "f16" else 4))

    def write(self, folder: Path) -> None:
        """Write FOLDER/manifest.json. It ends with the hash of its own text."""
        text = json_text(asdict(self) | {"format_version": FORMAT_VERSION, "sha256": NO_HASH}) + "\n"
        before, _, after = text.rpartition(NO_HASH)
        write_text_atomically(folder / MANIFEST_NAME, before + hashlib.sha256(text.encode()).hexdigest() + after)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read FOLDER/manifest.json. Raise ArtefactError if it is missing, changed, foreign or of a newer format."""
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
        if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
            raise ArtefactError(f"{path} is not a manifest of format {FORMAT_VERSION}; export the model again")
        if not _is_as_written(data, values):
            raise ArtefactError(f"{path} was changed after the export; export the model again")
        # fields of a later release are passed over
        names = {item.name for item in fields(cls)}
        try:
            manifest = cls(**{name: value for name, value in values.items() if name in names})
            manifest._check_shape()
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ArtefactError(f"{path} is incomplete: {error}; export the model again") from error
        return manifest

    def _check_shape(self) -> None:
        """Raise an exception if a field that loading reads has a wrong type or value."""
        if self.model_file not in self.files:
            raise ValueError(f"model_file {self.model_file!r} is not listed in files")
        if not all(isinstance(name, str) for name in self.training.get("job_names", ())):
            raise ValueError("job_names must be texts")
        for job in self.jobs:
            if "calibration" in job:
                Calibration(**job["calibration"])
                is_named = all(isinstance(job.get(name, ""), str) for name in ("constrain", "job"))
                if not is_named or "constrain" not in job or type(job["examples"]) is not int:
                    raise ValueError("a calibration has no grammar or number of examples")
        for name, entry in self.files.items():
            # somebody's manifest must not let a later copy or deletion reach other files
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} is outside the folder")
            if type(entry["bytes"]) is not int or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
                raise ValueError(f"files: {name!r} has no valid size and hash")
        if type(self.context_length) is not int or not isinstance(self.engine, str):
            raise ValueError("context_length must be a whole number and engine a name")
        self.cache_bytes(1)  # fails for widths of a wrong type
        if not all(isinstance(value, (int, float)) for value in self.sampling.values()):
            raise ValueError("sampling must have numbers only")
        if not all(isinstance(value, dict) for value in self.jobs):
            raise ValueError("jobs must be a list of scores")
        if not all(isinstance(value, str) for value in self.editable.values()):
            raise ValueError("editable must have names and hashes only")

    def check_files(self, folder: Path) -> None:
        """Raise ArtefactError if a file is missing or has another size. No content is read."""
        for name, entry in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ArtefactError(f"{path} is missing; copy the whole folder or export again")
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise ArtefactError(f"{path} has {size} bytes, not {entry['bytes']}; copy it again")


def _is_as_written(data: bytes, values: dict[str, Any]) -> bool:
    """Return True if the text of a manifest has the hash that the manifest states."""
    digest = str(values.get("sha256"))
    # The hash was computed of the text with the placeholder, see `write`.
    text = data.replace(digest.encode(), NO_HASH.encode())
    return hashlib.sha256(text).hexdigest() == digest


def cache_bytes(slots: int, heads: int, head_dim: int, element_bytes: int) -> int:
    """Return the size of the keys and values of `slots` tokens. `heads`: key/value heads of all layers together."""
    return 2 * element_bytes * slots * heads * head_dim


def manifest_cache_bytes(folder: Path, slots: int) -> int:
    """Return `Manifest.cache_bytes` of the artefact in `folder`, 0 without a manifest."""
    try:
        return Manifest.read(folder).cache_bytes(slots)
    except ArtefactError:
        return 0


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return sizes and hashes of an artefact's files, as in `Manifest.files`."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}
