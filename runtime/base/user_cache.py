"""Where this user's caches lie: what is kept there saves time and may be deleted at any moment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

FOLDER_VARIABLE = "EFFICIENTLLM_CACHE"
"""Environment variable that names another cache folder."""


def cache_folder() -> Path:
    """Where the system wants this user's caches; it need not exist yet."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    home = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA", "~")}.get(sys.platform, "~/.cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or home).expanduser() / "efficientllm"
