"""Keep the run that --overwrite replaces until the new one has something to write.

Everything is renamed within the run's folder. After a kill, the next command finds the whole old run, a partly moved
one, or a partly deleted one. Imports no torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from .run_folder import ASIDE, DELETED, MOVING, SETTINGS_FILE, empty_run_folder, run_entries


def set_aside_run(folder: Path) -> None:
    """Move the entries of the old run out of the way."""
    entries = run_entries(folder)
    if not entries:
        return
    moving = folder / MOVING
    moving.mkdir()
    for entry in entries:
        entry.rename(moving / entry.name)
    moving.rename(folder / ASIDE)


def is_replacing(folder: Path) -> bool:
    """Tell whether the new run in `folder` has not yet replaced the old one."""
    return (folder / ASIDE).is_dir()


def put_back(folder: Path) -> bool:
    """Delete the entries of the new run and restore the old one. Returns False without an old run."""
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
    """Restore the run that a killed run was to replace. A resumed one continues to replace it."""
    if not (resumes and is_replacing(folder) and (folder / SETTINGS_FILE).is_file()):
        put_back(folder)


def drop_replaced(folder: Path) -> None:
    """Delete the old run, before the new one writes its first checkpoint or its model."""
    if is_replacing(folder):
        (folder / ASIDE).rename(folder / DELETED)
    shutil.rmtree(folder / DELETED, ignore_errors=True)
