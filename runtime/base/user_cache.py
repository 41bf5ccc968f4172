"""The cache folder of this user, and the commit of this code."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .child import run

FOLDER_VARIABLE = "EFFICIENTLLM_CACHE"
"""Environment variable that names another cache folder."""


def cache_folder() -> Path:
    """Return the folder for files that save time and may be deleted at any moment. It may not exist yet."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    home = "~/.cache"
    if sys.platform == "darwin":
        home = "~/Library/Caches"
    elif sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA", "~")
    return Path(os.environ.get("XDG_CACHE_HOME") or home).expanduser() / "efficientllm"


def commit() -> str:
    """Return the short commit of this repository, with + for changed files, and "" outside a repository."""
    tree = Path(__file__).resolve().parents[2]
    if not (tree / ".git").exists():  # an installed package may lie in a repository of the user
        return ""
    try:
        done = run(["git", "-C", str(tree), "describe", "--always", "--dirty=+", "--exclude=*"])
    except OSError:
        return ""
    return done.output.strip() if done.code == 0 else ""
