"""Where this user's caches lie: what is kept there saves time and may be deleted at any moment.

The commit that this code is at, where it runs from its repository.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .child import run

FOLDER_VARIABLE = "EFFICIENTLLM_CACHE"
"""Environment variable that names another cache folder."""


def cache_folder() -> Path:
    """Where the system wants this user's caches; it need not exist yet."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    home = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA", "~")}.get(sys.platform, "~/.cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or home).expanduser() / "efficientllm"


def commit() -> str:
    """Short, with + where files differ from it; "" outside a repository."""
    tree = Path(__file__).resolve().parents[2]
    if not (tree / ".git").exists():  # installed: a repository around it is the user's
        return ""
    try:
        done = run(["git", "-C", str(tree), "describe", "--always", "--dirty=+", "--exclude=*"])
    except OSError:
        return ""
    return done.output.strip() if done.code == 0 else ""
