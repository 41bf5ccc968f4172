"""Write the grammar of a call's arguments whose free texts are words of the request, or listed and in the request."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from .grammar import embedded_schema

ToolArguments = Literal["any", "copy", "examples"]
"""Free texts in arguments of calls: any; words of the request; or those examples of their schemas that occur in it."""

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

    With `only_examples`, a text whose schema has examples is one of those that occur in the request, as it is listed.
    If none occurs, an argument is left out, or copied if it is required.

    A text is free if its schema has no keywords but its type and annotations. All other values follow their schema.
    """

    def __init__(
        self,
        texts: Sequence[str],
        *,
        are_spaced: bool = False,
        only_examples: bool = False,
        examples: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """Prepare to copy from `texts`, whose words are accepted as they are and in lower case.

        With `are_spaced`, a free text begins with a space (see spaced_texts). `examples` are more examples of texts, by
        the name of the argument.
        """
        self._only_examples, self._examples = only_examples, examples
        self._opening = json.dumps('" ' if are_spaced else '"')
        text = re.sub(r"[^\S\n]+", " ", "\n".join(texts)[-MAX_TEXT_CHARACTERS:])
        self._words = _between_separators(text) if only_examples else ""
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
        has_other_keywords = not set(parameters) <= OBJECT_KEYWORDS
        if has_other_keywords or not properties or not set(required) <= set(properties):
            return embedded_schema(parameters, format)
        definitions = {key: parameters[key] for key in DEFINITIONS if key in parameters}
        properties = {key: self._with_examples(key, schema) for key, schema in properties.items()}
        properties = {key: each for key, each in properties.items() if key in required or self._can_be_filled(each)}
        if not properties:
            return '"{}"'
        starts: list[str] = []
        is_first_possible = True
        for index, (key, schema) in enumerate(properties.items()):
            pair, rest = f"{name}_pair_{index}", f"{name}_rest_{index + 1}"
            # the first pair has no comma before it, so every pair that may be the first is a start of its own
            if is_first_possible:
                starts.append(f"{pair} {rest}")
            is_first_possible = is_first_possible and key not in required
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
            choices = [self._value(each, definitions, format) for each in schema["anyOf"]]
            return f"({' | '.join(choices)})"
        types = schema.get("type")
        types = types if isinstance(types, list) else [types]
        if keywords != {"type"} or "string" not in types:
            return embedded_schema({**definitions, **schema}, format)
        text, listed = "COPIED", _listed(schema)
        if listed:
            found = self._found(schema) if self._only_examples else []
            text = f"LISTED_{len(self.rules)}"  # the number of rules so far makes the name unique
            texts = found or listed
            choices = [_quoted_text(each) for each in texts]
            if not found:
                choices.insert(0, "RUN")
            self.rules.append(f'{text}: {self._opening} ({" | ".join(choices)}) "\\""')
        others = [each for each in types if each != "string"]
        return f"({text} | {embedded_schema({'type': others}, format)})" if others else text

    def _with_examples(self, key: str, schema: Any) -> Any:
        """Return the schema of an argument with the further examples of its name, if it is a free text."""
        if key not in self._examples or not isinstance(schema, dict) or schema.get("type") != "string":
            return schema
        return {**schema, "examples": [*_listed(schema), *self._examples[key]]}

    def _can_be_filled(self, schema: Any) -> bool:
        """Tell whether the request has a value of a text that must be one of its examples."""
        is_text = isinstance(schema, dict) and set(schema) - ANNOTATIONS == {"type"} and schema["type"] == "string"
        return not (self._only_examples and is_text and _listed(schema)) or bool(self._found(schema))

    def _found(self, schema: Mapping[str, Any]) -> list[str]:
        """Return the examples of a text that occur in the request as whole words, in any case."""
        return [each for each in _listed(schema) if each.strip() and _between_separators(each) in self._words]


def _listed(schema: Mapping[str, Any]) -> list[str]:
    """Return the texts among the examples and the default of a schema."""
    examples = schema.get("examples")
    listed = [*(examples if isinstance(examples, list) else ()), schema.get("default")]
    return [value for value in listed if isinstance(value, str)]


def _between_separators(text: str) -> str:
    """Return the words of a text in lower case, each between separators that no word contains."""
    words = (word for word in WORD.findall(text.casefold()) if not word.isspace())
    return "\0" + "\0".join(words) + "\0"


def _quoted_text(text: str) -> str:
    """Return the Lark literal of a text within a JSON string."""
    return json.dumps(_escaped(text))


def _escaped(text: str) -> str:
    """Return a text as it is written within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _quoted(text: str) -> str:
    """Return the Lark literal of a JSON string."""
    return json.dumps(json.dumps(text, ensure_ascii=False))
