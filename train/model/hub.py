"""Names of what lies on a model hub, told from paths of this machine. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
"""owner/name: letters, digits, and '.', '-', '_' within."""


def may_be_hub_id(name: str) -> bool:
    """Whether it is owner/name, and not the mistyped path of something in a folder that is there."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name.partition("/")[0]).exists()
