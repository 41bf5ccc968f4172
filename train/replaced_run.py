"""The run that --overwrite replaces: it lies aside until the new one has something to put in its place.

Everything is renamed within the run's folder. Where a run is killed, the next command finds what it left: the whole old
run aside, some of it on its way, or a rest that was being deleted. Imports no torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from .run_folder import ASIDE, DELETED, MOVING, SETTINGS_FILE, empty_run_folder, run_entries


def set_aside_run(folder: Path) -> None:
    """Move what runs wrote out of the way of a new one."""
    entries = run_entries(folder)
    if not entries:
        return
    moving = folder / MOVING
    moving.mkdir()
    for entry in entries:
        entry.rename(moving / entry.name)
    moving.rename(folder / ASIDE)


def is_replacing(folder: Path) -> bool:
    """Whether the run in `folder` has nothing yet that is worth more than the one it replaces."""
    return (folder / ASIDE).is_dir()


def put_back(folder: Path) -> bool:
    """Delete what the new run wrote and bring the old one back; False where none lies aside."""
    aside, moving = folder / ASIDE, folder / MOVING
    shutil.rmtree(folder / DELETED, ignore_errors=True)
    if aside.is_dir():
        empty_run_folder(folder)
        aside.rename(moving)
    if not moving.is_dir():
        return False
    for entry in moving.iterdir():
        entry.rename(folder / entry.name)
    moving.rmdir()
    return True


def recover(folder: Path, resumes: bool) -> None:
    """Put back what a killed run was to replace; one that is resumed goes on replacing it."""
    if not (resumes and is_replacing(folder) and (folder / SETTINGS_FILE).is_file()):
        put_back(folder)


def drop_replaced(folder: Path) -> None:
    """Delete the old run: the new one is about to write its first checkpoint or its model."""
    if is_replacing(folder):
        (folder / ASIDE).rename(folder / DELETED)
    shutil.rmtree(folder / DELETED, ignore_errors=True)
