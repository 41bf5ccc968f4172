"""What Ollama reads of a model hub's repository beside a GGUF (`ollama run hf.co/OWNER/NAME`): `template`, `params`.

A Modelfile says the same for `ollama create`; there it is written by the export and may have been changed by hand.
"""

from __future__ import annotations

import json
import re
from typing import Any

FILES = ("template", "params")


def ollama_files(modelfile: str) -> dict[str, str]:
    """{file: its text} of what a Modelfile says."""
    parameters: dict[str, Any] = {}
    for name, value in re.findall(r"^PARAMETER (\w+) (.+)$", modelfile, re.MULTILINE):
        if name == "stop":
            parameters.setdefault("stop", []).append(_value(value))
        else:
            parameters[name] = _value(value)
    template = re.search(r'^TEMPLATE """(.*?)"""', modelfile, re.MULTILINE | re.DOTALL)
    files = {"template": template[1]} if template else {}
    return files | ({"params": json.dumps(parameters, ensure_ascii=False, indent=2) + "\n"} if parameters else {})


def _value(text: str) -> Any:
    """A number or a quoted text; anything else is a text as it stands."""
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()
