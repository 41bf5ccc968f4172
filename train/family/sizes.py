"""Finished models of several sizes from one run (--sizes).

The run prunes to the smallest size. Before a removal goes below a larger size, the run's state becomes a branch: the
folder sizes/NAME of a run that may be resumed. Once the smallest model is finished, each branch trains to its end with
the decay of the learning rate that the smallest one had. A branch is a run like any other, so a kill loses nothing.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...runtime.base.errors import UsageError
from ...runtime.base.files import folder_written_atomically, link_or_copy, write_json_atomically, write_text_atomically
from ...runtime.base.quantities import format_bytes, format_count, markdown_table
from ..checkpoint.milestone import Milestone
from ..checkpoint.run_folder import (
    SCORES_FILE,
    SETTINGS_FILE,
    SIZES_FOLDER,
    is_finished,
    newest_sound_checkpoint,
    saved_config,
)
from ..checkpoint.writer import Checkpoints
from ..config.pruning import SIZES_FILE
from ..config.sections import GGUF_TYPES, TrainConfig
from ..model.architecture import Architecture
from ..model.file_types import irregular_gguf, tokenizer_bytes
from ..model.folder_files import read_json
from ..pruning.budget import DEFAULT_TYPE
from ..pruning.measures import Measure, bytes_of_file
from ..pruning.pruner import Pruner
from ..reporting.plots import plot_sizes

_log = logging.getLogger("efficientllm.train")

NO_MODEL = "has no model of its own: one removal went from a larger size to a smaller one, or its folder was deleted"


def branch_folder(folder: Path, size: str) -> Path:
    """Return the folder of a larger size of the run in `folder`."""
    return folder / SIZES_FOLDER / size


def has_branch(folder: Path, size: str) -> bool:
    """Tell whether the state of a larger size is written."""
    return (branch_folder(folder, size) / SETTINGS_FILE).is_file()


def resumed_branch(folder: Path, size: str) -> TrainConfig:
    """Return the configuration that finishes a larger size. `folder` may have moved since the branch was written.

    Raises UsageError if the state of the branch is gone.
    """
    branch = branch_folder(folder, size)
    config = saved_config(branch)
    checkpoint, _ = newest_sound_checkpoint(branch / "checkpoints")
    if checkpoint is None:  # without one, the branch would start again from the source
        raise UsageError(f"--resume: {branch} has no undamaged checkpoint; delete that folder to leave the size out")
    return replace(config, run=replace(config.run, output=str(branch), resume=True))


def branch_config(config: TrainConfig, size: str, tokens: int) -> TrainConfig:
    """Return the configuration of a larger size whose state was written after `tokens`.

    The branch decays the learning rate at once, and for as many tokens as the run does at its end. Rounding to the
    type of --qat starts as many tokens before the end as in the run.
    """
    optimizer, quantisation = config.optimizer, config.quantisation
    decay = round(optimizer.lr_decay * optimizer.tokens)
    total = tokens + decay
    if quantisation.is_on:
        rounded = (1 - quantisation.qat_start) * optimizer.tokens
        quantisation = replace(quantisation, qat_start=max(0.0, 1 - rounded / total))
    warmup = min(1.0, optimizer.lr_warmup * optimizer.tokens / total)
    return replace(
        config,
        pruning=replace(config.pruning.of_size(size), removals=0),
        optimizer=replace(optimizer, tokens=total, lr_decay=decay / total, lr_warmup=warmup),
        quantisation=quantisation,
        run=replace(
            config.run,
            output=str(branch_folder(Path(config.run.output), size)),
            branch_of="../..",
            overwrite=False,
            resume=False,
        ),
    )


def write_branch(config: TrainConfig, size: str, checkpoint: Path, tokens: int) -> None:
    """Write the branch of a larger size from the run's checkpoint after `tokens`. Unchanged files share their bytes."""
    folder = Path(config.run.output)
    with folder_written_atomically(branch_folder(folder, size)) as temporary:
        shutil.copytree(checkpoint, temporary / "checkpoints" / checkpoint.name, copy_function=link_or_copy)
        for name in ("metrics.jsonl", SCORES_FILE):  # copied, not linked: both runs append to their own
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        text = branch_config(config, size, tokens).to_toml()
        write_text_atomically(temporary / SETTINGS_FILE, text)


class Branches(Milestone):
    """Writes the branches of a run with --sizes."""

    def __init__(self, config: TrainConfig, pruner: Pruner, checkpoints: Checkpoints) -> None:
        self.config, self.pruner, self.checkpoints = config, pruner, checkpoints

    def before_removal(self, target: float) -> None:
        """Write the branches of the sizes that the model has and would lose by a removal down to `target`."""
        checkpoints, parallel = self.checkpoints, self.checkpoints.trained.parallel
        for size, amount in self.pruner.plan.sizes.items():
            is_reached = self.pruner.size <= amount
            would_be_lost = target < amount
            if not (is_reached and would_be_lost) or has_branch(checkpoints.folder, size):
                continue
            checkpoints.save_once()
            if parallel.is_main:
                write_branch(self.config, size, checkpoints.current, checkpoints.progress.tokens)
            parallel.barrier()
            checkpoints.display.say(f"size {size} is reached: it is finished after the smallest one")


@dataclass(frozen=True)
class Member:
    """The finished model of one size."""

    size: str
    """Its text in --sizes."""
    folder: Path
    """Folder of its run."""
    architecture: Architecture
    training: dict[str, Any]
    """Contents of its training.json."""

    @classmethod
    def read(cls, size: str, folder: Path) -> Member:
        """Read a finished run."""
        model = folder / "model"
        training = read_json(model / "training.json")
        return cls(size, folder, Architecture.from_folder(model), training)

    @property
    def score(self) -> dict[str, float] | None:
        """Return the last score of the job and its standard error, or None without --task."""
        path = self.folder / SCORES_FILE
        return read_json(path)["sizes"][-1] if path.is_file() else None

    @cached_property
    def file_types(self) -> tuple[str, str]:
        """Return the types of the weights and of the LM head in which the run counts the bytes of a GGUF."""
        config = saved_config(self.folder)
        pruning, qat = config.pruning, config.quantisation
        if qat.qat in GGUF_TYPES:
            return qat.qat, qat.head_type
        return pruning.quantize or DEFAULT_TYPE, pruning.output_type

    @cached_property
    def file_bytes(self) -> Measure:
        """Return the measure of bytes of a GGUF in the type of the run, with the tokenizer of this model."""
        from transformers import AutoTokenizer

        kind, head = self.file_types
        vocabulary = tokenizer_bytes(AutoTokenizer.from_pretrained(self.folder / "model"))
        return bytes_of_file(kind, vocabulary, head_type=head)

    @property
    def num_bytes(self) -> float | None:
        """Return the bytes of the exported GGUF, or None if llama.cpp lacks the shape."""
        return self.file_bytes.of(self.architecture) if irregular_gguf(self.architecture) else None

    @property
    def bits_per_byte(self) -> float | None:
        """Return the bits per byte of held-out text, or None unless rows may be removed."""
        return self.training.get("bits_per_byte", {}).get("final")


def members_of(folder: Path) -> list[Member]:
    """Return the finished models of the run in a folder, largest first. A run without --sizes has one or none."""
    sizes = saved_config(folder).pruning.sizes
    folders = {size: branch_folder(folder, size) for size in sizes[:-1]}
    folders[sizes[-1] if sizes else ""] = folder
    return [Member.read(size, each) for size, each in folders.items() if is_finished(each)]


def unfinished_sizes(folder: Path) -> list[str]:
    """Return the larger sizes of a run whose branch is written and not finished."""
    sizes = saved_config(folder).pruning.sizes[:-1]
    return [size for size in sizes if has_branch(folder, size) and not is_finished(branch_folder(folder, size))]


def has_sizes(folder: Path) -> bool:
    """Tell whether a folder holds a run with --sizes."""
    return (folder / SETTINGS_FILE).is_file() and bool(saved_config(folder).pruning.sizes)


def lacks_sizes(folder: Path) -> bool:
    """Tell whether a run with --sizes has unfinished branches, or no comparison of its sizes."""
    return has_sizes(folder) and (bool(unfinished_sizes(folder)) or not (folder / SIZES_FILE).is_file())


def check_sizes_are_finished(folder: Path) -> None:
    """Raise UsageError if sizes of a run are not finished."""
    if lacks_sizes(folder):
        raise UsageError(
            f"{folder}: not all sizes are finished; first run efficientllm-train --resume --output {folder}"
        )


def write_sizes(folder: Path) -> None:
    """Write sizes.json, sizes.md and sizes.png: what each size of a finished run takes, and how well it does."""
    members = members_of(folder)
    rows = [_row(member, folder) for member in members]
    plot_sizes(rows, folder / "sizes.png")
    trained = {member.size for member in members}
    skipped = [size for size in saved_config(folder).pruning.sizes if size not in trained]
    for size in skipped:
        _log.warning(f"size {size} {NO_MODEL}")
    write_text_atomically(folder / "sizes.md", _table(rows, skipped))
    write_json_atomically(folder / SIZES_FILE, {"sizes": rows})


def _row(member: Member, folder: Path) -> dict[str, Any]:
    training, score = member.training, member.score
    return {
        "size": member.size,
        "folder": os.path.relpath(member.folder, folder),
        "parameters": training["parameters"],
        "bytes": member.num_bytes,
        "ms": training.get("latency", {}).get("ms"),
        "tokens": training["tokens"],
        "perplexity": training["perplexity"].get("final"),
        "bits_per_byte": member.bits_per_byte,
        "score": score["score"] if score else None,
        "stderr": score["stderr"] if score else None,
    }


def _table(rows: Sequence[dict[str, Any]], skipped: Sequence[str]) -> str:
    """Return the comparison as Markdown. Perplexities of different vocabularies are not compared."""
    columns: list[tuple[str, Any]] = [
        ("size", lambda row: row["size"]),
        ("folder", lambda row: f"`{row['folder']}`"),
        ("parameters", lambda row: format_count(row["parameters"])),
    ]
    optional = {
        "bytes": ("file", lambda row: format_bytes(row["bytes"])),
        "ms": ("predicted ms", lambda row: f"{row['ms']:.2f}"),
        "bits_per_byte": ("bits per byte", lambda row: f"{row['bits_per_byte']:.3f}"),
        "perplexity": ("perplexity", lambda row: f"{row['perplexity']:.2f}"),
        "score": ("score", lambda row: f"{row['score']:.3f} ± {row['stderr']:.3f}"),
    }
    if all(row["bits_per_byte"] is not None for row in rows):
        del optional["perplexity"]
    for name, column in optional.items():
        if all(row[name] is not None for row in rows):
            columns.append(column)
    table = [[title for title, _ in columns]]
    table += [[show(row) for _, show in columns] for row in rows]
    shown = markdown_table(table, left=(0, 1))
    notes = ["The picture is sizes.png. Every folder is a run.", *(f"Size {size} {NO_MODEL}." for size in skipped)]
    return "\n\n".join(["# Sizes of one run", shown, *notes]) + "\n"
