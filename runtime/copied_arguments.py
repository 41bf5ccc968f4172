"""Write the grammar of a call's arguments whose free texts are runs of words of the request."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .grammar import embedded_schema

MAX_TEXT_CHARACTERS = 1 << 14
"""Largest length of the text to copy from. The end of a longer one is used."""

WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+|\W")
"""A word, a sign, or a character of a script without spaces between words (Thai, Lao, Japanese, Chinese)."""

ANNOTATIONS = {"title", "description", "examples", "default", "deprecated"}
"""Keywords of a JSON schema that restrict nothing."""

DEFINITIONS = ("$defs", "definitions")

OBJECT_KEYWORDS = ANNOTATIONS | {"type", "properties", "required", "additionalProperties", "$schema"} | {*DEFINITIONS}
"""Keywords of parameters whose arguments may be copied."""


class CopiedArguments:
    """Lark rules for arguments. A free text is a run of words of the request, or an example or default of its schema.

    A text is free if its schema has no keywords but its type and annotations. All other values follow their schema.
    """

    def __init__(self, texts: Sequence[str], *, are_spaced: bool = False) -> None:
        """Prepare to copy from `texts`, whose words are accepted as they are and in lower case.

        With `are_spaced`, a free text begins with a space (see spaced_texts).
        """
        self._opening = json.dumps('" ' if are_spaced else '"')
        text = re.sub(r"[^\S\n]+", " ", "\n".join(texts)[-MAX_TEXT_CHARACTERS:])
        # The chunk "\n" separates lines, because a RUN has none.
        chunks = [word if word == "\n" else _escaped(word) for word in WORD.findall(f"{text}\n{text.lower()}")]
        self.rules = [
            f"WORDS: %regex {json.dumps({'substring_chunks': chunks})}",
            r"RUN: WORDS & /([^ \n](.*[^ \n])?)?/",
            rf'COPIED: {self._opening} RUN "\""',
        ]
        """The rules so far, to which `add` appends those of a function."""

    def add(self, name: str, parameters: Mapping[str, Any], format: Any) -> str:
        """Return the expression of the arguments of one function, whose new rules begin with `name`.

        llguidance must have accepted `parameters`, a JSON schema. JSON has its `format`.
        """
        properties, required = parameters.get("properties"), parameters.get("required", [])
        if not set(parameters) <= OBJECT_KEYWORDS or not properties or not set(required) <= set(properties):
            return embedded_schema(parameters, format)
        definitions = {key: parameters[key] for key in DEFINITIONS if key in parameters}
        starts: list[str] = []
        for index, (key, schema) in enumerate(properties.items()):
            pair, rest = f"{name}_pair_{index}", f"{name}_rest_{index + 1}"
            if not any(earlier in required for earlier in list(properties)[:index]):
                starts.append(f"{pair} {rest}")
            mark = "" if key in required else "?"
            self.rules.append(f'{pair}: {_quoted(key)} ": " {self._value(schema, definitions, format)}')
            self.rules.append(f'{name}_rest_{index}: (", " {pair}){mark} {rest}')
        self.rules.append(f'{name}_rest_{len(properties)}: ""')
        return f'"{{" ({" | ".join(starts)}){"" if required else "?"} "}}"'

    def _value(self, schema: Any, definitions: Mapping[str, Any], format: Any) -> str:
        """Return the expression of one argument."""
        if isinstance(schema, bool):
            return f"%json {json.dumps(schema)}"
        keywords = set(schema) - ANNOTATIONS
        if keywords == {"anyOf"}:
            return f"({' | '.join(self._value(each, definitions, format) for each in schema['anyOf'])})"
        types = schema.get("type")
        types = types if isinstance(types, list) else [types]
        if keywords != {"type"} or "string" not in types:
            return embedded_schema({**definitions, **schema}, format)
        text, examples = "COPIED", schema.get("examples")
        listed = [*(examples if isinstance(examples, list) else ()), schema.get("default")]
        if given := [value for value in listed if isinstance(value, str)]:
            text = f"LISTED_{len(self.rules)}"
            choices = " | ".join(["RUN", *(json.dumps(_escaped(value)) for value in given)])
            self.rules.append(f'{text}: {self._opening} ({choices}) "\\""')
        others = [each for each in types if each != "string"]
        return f"({text} | {embedded_schema({'type': others}, format)})" if others else text


def _escaped(text: str) -> str:
    """Return a text as it is written within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _quoted(text: str) -> str:
    """Return the Lark literal of a JSON string."""
    return json.dumps(json.dumps(text, ensure_ascii=False))
