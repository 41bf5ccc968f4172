"""What Ollama reads of a model hub's repository beside a GGUF (`ollama run hf.co/OWNER/NAME`): `template`, `params`.

A Modelfile says the same for `ollama create`; there it is written by the export and may have been changed by hand.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

FILES = ("template", "params")

COMMAND = re.compile(
    r"""^[ \t]*(?:parameter[ \t]+(?P<parameter>\w+)|(?P<name>[a-z]+))[ \t]+"""
    r'''(?:"""(?P<long>.*?)"""|"(?P<quoted>.*?)"(?=[ \t]*$)|(?P<plain>.*?)[ \t]*$)''',
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
"""A Modelfile's NAME text, or PARAMETER name text; a text in quotes may have several lines."""


def ollama_files(modelfile: str) -> dict[str, str]:
    """{file: its text} of what a Modelfile says; of a template, as Ollama takes it, the last."""
    parameters: dict[str, Any] = {}
    template = None
    for found in COMMAND.finditer(modelfile):  # what stands in another one's text is no command
        text = next(each for each in (found["long"], found["quoted"], found["plain"]) if each is not None)
        parameter = (found["parameter"] or "").lower()
        if parameter == "stop":
            parameters.setdefault("stop", []).append(text)
        elif parameter:
            parameters[parameter] = _value(text)
        elif found["name"].lower() == "template":
            template = text
    files = {"template": template} if template is not None else {}
    return files | ({"params": json.dumps(parameters, ensure_ascii=False, indent=2) + "\n"} if parameters else {})


def _value(text: str) -> Any:
    """A number, true or false; anything else is a text as it stands."""
    if text in ("true", "false"):
        return text == "true"
    try:
        number = float(text)
    except ValueError:
        return text
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else number if math.isfinite(number) else text
