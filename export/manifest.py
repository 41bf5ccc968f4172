"""Write the manifest of an artefact, and find files that an export did not write."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.base.errors import ArtefactError
from ..runtime.base.files import sha256_of
from ..runtime.base.output import unknown_files
from ..runtime.base.quantities import display_name, format_bytes
from ..runtime.engines.manifest import JOB_FILE, MANIFEST_NAME, Manifest, describe_files
from ..train.model.folder_files import TEMPLATE_FILE, TOKENIZER_SETTINGS
from .checkpoint import Checkpoint
from .request import ExportRequest

BEGINNING = 8000
"""Bytes at the beginning in which a binary file has a zero, as in git."""
TOKENIZER_FILES = ("tokenizer.json", TOKENIZER_SETTINGS, "special_tokens_map.json", TEMPLATE_FILE)


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy the tokenizer's files and the chat template, and return the names of the existing ones."""
    names = [name for name in TOKENIZER_FILES if (checkpoint.folder / name).is_file()]
    for name in names:
        shutil.copy(checkpoint.folder / name, folder / name)
    settings = checkpoint.json_file(TOKENIZER_SETTINGS)
    # also there, where transformers.js' tokenizers read the template
    if TOKENIZER_SETTINGS in names and checkpoint.chat_template is not None and "chat_template" not in settings:
        settings = {**settings, "chat_template": checkpoint.chat_template}
        (folder / TOKENIZER_SETTINGS).write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
    return names


@dataclass(frozen=True)
class Contents:
    """Files that an exporter wrote."""

    engine: str
    """Runtime engine that loads them."""
    files: list[str]
    """File names, the model first."""
    quantization: str
    weight_bytes: int
    """Bytes of all tensors."""
    layout: str
    """The format's name for this kind of model."""
    verification: dict[str, Any]
    editable: tuple[str, ...] = ()
    """Files in the folder that the user may change."""


def write_manifest(checkpoint: Checkpoint, request: ExportRequest[Any], folder: Path, contents: Contents) -> None:
    """Write the manifest of an artefact and report its size."""
    request.clock.begin("hashing")
    bits = bits_per_weight(checkpoint, contents.weight_bytes)
    training = checkpoint.json_file("training.json")
    pruned_for = training.get("latency", {}).get("of", {})
    if pruned_for and (pruned_for["engine"], pruned_for["quantization"]) != (contents.engine, contents.quantization):
        request.say(
            f"pruned for the milliseconds of {pruned_for['engine']} {pruned_for['quantization']}; those of "
            f"{contents.engine} {contents.quantization} are others: efficientllm-bench measures them"
        )
    files = describe_files(folder, contents.files)
    request.clock.end()
    manifest = Manifest(
        engine=contents.engine,
        model_file=contents.files[0],
        files=files,
        quantization=contents.quantization,
        bits_per_weight=round(bits, 3),
        architecture=checkpoint.architecture.to_dict(),
        context_length=checkpoint.context_length,
        source=display_name(checkpoint.name),
        verification=contents.verification,
        training=training,
        jobs=tuple(checkpoint.json_file(JOB_FILE).get("jobs", ())),
        sampling=checkpoint.sampling,
        notes=tuple(request.notes),
        limits=tuple(request.limits),
        stage_seconds=request.clock.seconds,
        editable={name: sha256_of(folder / name) for name in contents.editable},
    )
    manifest.write(folder)
    size = format_bytes(manifest.total_bytes)
    request.say(f"{contents.layout}, {contents.quantization}: {size}, {bits:.2f} bits per weight")


def foreign_files(folder: Path) -> list[str]:
    """Return the files in an artefact's folder that no export wrote, or that somebody changed since.

    If the manifest cannot be read, these are all files. Damaged weights may be replaced.
    """
    try:
        manifest = Manifest.read(folder)
    except ArtefactError:
        return sorted(entry.name for entry in folder.iterdir())
    hashes = {name: entry["sha256"] for name, entry in manifest.files.items()} | manifest.editable

    def is_ours(path: Path, name: str) -> bool:
        with path.open("rb") as stream:
            is_binary = b"\0" in stream.read(BEGINNING)
        return is_binary or name not in hashes or sha256_of(path) == hashes[name]

    return unknown_files(folder, [*hashes, MANIFEST_NAME], is_ours)


def bits_per_weight(checkpoint: Checkpoint, weight_bytes: int) -> float:
    """Return the bits of all tensors per parameter of the checkpoint, with padding as overhead."""
    return 8 * weight_bytes / checkpoint.architecture.num_parameters


CHAT_DEFAULTS = {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1}
"""Defaults of the server's chat page if the checkpoint has none."""

RANGES = {"temperature": (0.0, 2.0), "top_p": (0.01, 1.0), "repetition_penalty": (0.5, 2.0)}


def generation_defaults(checkpoint: Checkpoint) -> dict[str, float]:
    """Return {temperature, top_p, repetition_penalty} with our defaults for missing or invalid values."""
    given = checkpoint.sampling
    chosen = {}
    for name, (low, high) in RANGES.items():
        if low <= given.get(name, -1) <= high:
            chosen[name] = float(given[name])
    return CHAT_DEFAULTS | chosen
