"""Names on a model hub, told from paths of this machine, and whether it can be asked. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
"""owner/name: letters, digits, and '.', '-', '_' within."""


def may_be_hub_id(name: str) -> bool:
    """Whether it is owner/name, and not the mistyped path of something in a folder that is there."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name.partition("/")[0]).exists()


ANSWER_SECONDS = 10
"""How long the hub may take to say what it knows of a name."""


def hub_answers(kind: Literal["model", "dataset"], name: str) -> bool:
    """Whether the hub can be asked, tried once: the libraries try six times, for half a minute, before they say so."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=ANSWER_SECONDS)
    except HfHubHTTPError:  # a refusal is an answer
        return True
    except Exception:  # what its library for HTTP raises without a connection changes from release to release
        return False
    return True
