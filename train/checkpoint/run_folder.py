"""Files of a run's folder, and the older run that --overwrite replaces. Imports no torch.

The older run is kept until the new one has something to write. It is renamed within the folder, so the next command
after a kill finds it whole, partly moved, or partly deleted.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runtime.base import flags
from ...runtime.base.errors import UsageError
from ...runtime.base.files import sha256_of, write_json_atomically
from ...runtime.base.output import LOCK_NAME
from ...runtime.engines.manifest import JOB_FILE, describe_files
from ..config.pruning import SIZES_FILE
from ..config.sections import TrainConfig

CHECKPOINT_NAME = re.compile(r"step-(\d{8})")
DAMAGED_PREFIX = "damaged-"
"""Name prefix of a checkpoint that could not be read and is kept aside."""

CONTENTS_NAME = "contents.json"
"""File of a checkpoint with {file: {"bytes", "sha256"}} of all its other files."""

SETTINGS_FILE = "config.toml"
FINISHED_FILE = "architecture.json"
"""File that is written last. A model without it was not measured yet."""
SCORES_FILE = "scores.json"
"""File with the score of a job at every size of a run."""
SIZES_FOLDER = "sizes"
"""Folder with a run for each larger size of --sizes."""
LATER_STEPS_FOLDER = "later-steps"
"""Folder with the changes of weights after a larger size, until all sizes are finished."""
LATER_STEPS_FILES = ("step-*.weights", "step-*.changes", ".step-*.tmp")
RUN_FILES = (
    SETTINGS_FILE,
    SCORES_FILE,
    "metrics.jsonl",
    FINISHED_FILE,
    SIZES_FILE,
    "sizes.md",
    "sizes.png",
    "architecture.png",
    "pruning.png",
)
RUN_FOLDERS = ("checkpoints", "model", SIZES_FOLDER, LATER_STEPS_FOLDER, "tensorboard")
MODEL_FILES = (
    *("config.json", "generation_config.json", "training.json", "quality.json", "README.md", "architecture.png"),
    JOB_FILE,
    *("modeling_*.py", "*.safetensors", "model.safetensors.index.json", "chat_template.jinja"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
)
"""Patterns of files that `save_checkpoint` and transformers' tokenizers write."""

UNFINISHED = re.compile(
    r"\.(model|later-steps|step-\d{8})\.efficientllm-(new|old)|"
    r"\.(config\.toml|metrics\.jsonl|\w+\.json|\w+\.png|README\.md)\.\d+\.tmp"
)
"""Files of a killed write."""

CHECKPOINT_ENTRIES = ("config.json", "tensors.pt", "trainer.json", "state")
"""Entries of a checkpoint beside contents.json."""

ASIDE, MOVING, DELETED = (f".efficientllm-{name}" for name in ("replaced", "moving", "deleted"))
"""Folders of the replaced run: whole, while it is moved, and while it is deleted."""

LOG_FILES = ("events.out.tfevents.*",)
"""Patterns of files that TensorBoard writes."""


def saved_config(folder: Path) -> TrainConfig:
    """Return the configuration of the run in a folder. Raises UsageError if there is none."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise UsageError(f"--resume: {folder} holds no run (no {SETTINGS_FILE})")
    try:
        values = flags.read_toml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither UTF-8 nor TOML
        raise UsageError(f"{path} is damaged: {error}") from error
    return flags.merge(TrainConfig(), values, str(path))


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the complete checkpoints under a run's `checkpoints` folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(e for e in folder.iterdir() if CHECKPOINT_NAME.fullmatch(e.name) and _is_checkpoint(e))


def write_contents(checkpoint: Path, known: dict[str, dict[str, Any]]) -> None:
    """Write size and hash of every file of a checkpoint, by which `damage` finds a changed one.

    `known` are those of files that were hashed as they were written. All others are read.
    """
    files = [file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if file.is_file()]
    others = describe_files(checkpoint, [name for name in files if name not in known])
    contents = {name: (known | others)[name] for name in sorted(files)}
    write_json_atomically(checkpoint / CONTENTS_NAME, contents)


def damage(checkpoint: Path) -> str:
    """Return the damage of a checkpoint's files, or an empty string."""
    try:
        contents = json.loads((checkpoint / CONTENTS_NAME).read_text(encoding="utf-8"))
        missing = {name for name in CHECKPOINT_ENTRIES if name != "state"} - contents.keys()
        if missing:
            return f"{CONTENTS_NAME} does not list {min(missing)}"
        for name, entry in contents.items():
            size = (checkpoint / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size:,} bytes, not {entry['bytes']:,}"
            if sha256_of(checkpoint / name) != entry["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{os.path.relpath(error.filename, checkpoint)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{CONTENTS_NAME} cannot be read: {error}"
    return ""


def newest_sound_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return (the newest sound checkpoint, newer ones with their damage)."""
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(checkpoint_folders(folder)):  # every file is read, so it stops at the first sound one
        reason = damage(checkpoint)
        if not reason:
            return checkpoint, damaged
        damaged[checkpoint] = reason
    return None, damaged


def foreign_files(folder: Path) -> list[str]:
    """Return the files in a run's folder that no run wrote."""
    hidden = (LOCK_NAME, ASIDE, MOVING, DELETED)
    others = [entry.name for entry in folder.iterdir() if not _is_run_entry(entry) and entry.name not in hidden]
    for entry in _entries(folder / "model"):
        is_known = _matches(entry, MODEL_FILES) or UNFINISHED.fullmatch(entry.name)
        if entry.is_dir() or not is_known:
            others.append(f"model/{entry.name}")
    for entry in _entries(folder / "checkpoints"):
        name = entry.name.removeprefix(DAMAGED_PREFIX)
        if UNFINISHED.fullmatch(entry.name):
            continue
        if not CHECKPOINT_NAME.fullmatch(name) or not _is_checkpoint(entry):
            others.append(f"checkpoints/{entry.name}")
    if (folder / "model").is_dir() and not (folder / "model" / "training.json").is_file():
        others.append("model")  # somebody's: a run's has its figures beside the weights
    for entry in _entries(folder / SIZES_FOLDER):
        if entry.is_dir():
            others += [f"{SIZES_FOLDER}/{entry.name}/{name}" for name in foreign_files(entry)]
        elif not UNFINISHED.fullmatch(entry.name) and not entry.name.endswith(LOCK_NAME):
            others.append(f"{SIZES_FOLDER}/{entry.name}")
    patterns = {"tensorboard": LOG_FILES, LATER_STEPS_FOLDER: LATER_STEPS_FILES}
    for name, known in patterns.items():
        others += [f"{name}/{entry.name}" for entry in _entries(folder / name) if not _matches(entry, known)]
    return sorted(others)


def _matches(entry: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(entry.name, pattern) for pattern in patterns)


def _is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder has only entries of a checkpoint."""
    return folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {*CHECKPOINT_ENTRIES, CONTENTS_NAME}


def drop_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a finished run. Damaged ones and added files stay."""
    for checkpoint in checkpoint_folders(folder):
        shutil.rmtree(checkpoint)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_run_entry(entry: Path) -> bool:
    """Tell whether runs write this entry of a run's folder. Links belong to somebody else."""
    if entry.is_symlink():
        return False
    return entry.name in (RUN_FOLDERS if entry.is_dir() else RUN_FILES) or bool(UNFINISHED.fullmatch(entry.name))


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def run_entries(folder: Path) -> list[Path]:
    """Return the entries of a folder that runs write."""
    return [entry for entry in _entries(folder) if _is_run_entry(entry)]


def holds_only_killed_writes(folder: Path) -> bool:
    """Tell whether a run was killed in this folder before it wrote its settings."""
    return all(entry.name == LOCK_NAME or UNFINISHED.fullmatch(entry.name) for entry in _entries(folder))


def is_finished(folder: Path) -> bool:
    """Tell whether the run in a folder wrote its model and measured it."""
    return (folder / "model").is_dir() and (folder / FINISHED_FILE).is_file()


def clear_run_folder(folder: Path) -> None:
    """Delete the entries that runs write, and create a missing folder."""
    for entry in run_entries(folder):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    folder.resolve().mkdir(parents=True, exist_ok=True)  # of a link that leads nowhere, what it names


def rename_damaged(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, so that no resumed run reads it again."""
    aside = checkpoint.with_name(f"{DAMAGED_PREFIX}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def stash_run(folder: Path) -> None:
    """Move the entries of the old run out of the way."""
    entries = run_entries(folder)
    if not entries:
        return
    # ASIDE appears at once and whole. MOVING alone tells the next command that a process was killed within this loop.
    moving = folder / MOVING
    moving.mkdir()
    for entry in entries:
        entry.rename(moving / entry.name)
    moving.rename(folder / ASIDE)


def has_stashed_run(folder: Path) -> bool:
    """Tell whether the new run in `folder` has not yet replaced the old one."""
    return (folder / ASIDE).is_dir()


def restore_replaced_run(folder: Path) -> bool:
    """Delete the entries of the new run and restore the old one. Returns False without an old run."""
    aside, moving = folder / ASIDE, folder / MOVING
    shutil.rmtree(folder / DELETED, ignore_errors=True)
    if aside.is_dir():
        clear_run_folder(folder)
        aside.rename(moving)
    if not moving.is_dir():
        return False
    for entry in moving.iterdir():
        entry.rename(folder / entry.name)
    moving.rmdir()
    return True


def recover(folder: Path, resumes: bool) -> None:
    """Restore the run that a killed run was to replace. A resumed one continues to replace it."""
    if not (resumes and has_stashed_run(folder) and (folder / SETTINGS_FILE).is_file()):
        restore_replaced_run(folder)


def delete_replaced_run(folder: Path) -> None:
    """Delete the old run, before the new one writes its first checkpoint or its model."""
    if has_stashed_run(folder):  # renamed first: a half-deleted run must not be restored
        (folder / ASIDE).rename(folder / DELETED)
    shutil.rmtree(folder / DELETED, ignore_errors=True)
