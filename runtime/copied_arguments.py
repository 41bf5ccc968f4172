"""Write the grammar of a call's arguments whose free texts are words of the request, or listed and in the request."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from .base.errors import UsageError
from .grammar import embedded_schema, schema_part

ToolArguments = Literal["any", "copy", "examples"]
"""Free texts in arguments of calls: any; words of the request; or those examples of their schemas that occur in it."""

MAX_COPIED_CHARACTERS = 1 << 15
"""Largest length of the words to copy from, as the grammar writes them. The last ones of a longer request are used.

Both forms, as written and in lower case, take half of a grammar's MAX_CHARACTERS.
"""

MARKS = r"\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0900-\u0963\u0966-\u0dff"
"""Accents and vowel signs, and the letters of the scripts of India among them. No \\w matches a sign by itself."""

WORD = re.compile(rf"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[\w{MARKS}]+|\W")
"""A word, a sign, or a character of a script without spaces between words (Thai, Lao, Japanese, Chinese)."""

ANNOTATIONS = {"title", "description", "examples", "default", "deprecated"}
"""Keywords of a JSON schema that restrict nothing."""

DEFINITIONS = ("$defs", "definitions")

OBJECT_KEYWORDS = ANNOTATIONS | {"type", "properties", "required", "additionalProperties", "$schema"} | {*DEFINITIONS}
"""Keywords of parameters whose arguments may be copied."""


class CopiedArguments:
    """Lark rules for arguments. A free text is a run of words of the request, or an example or default of its schema.

    With `only_examples`, a text whose schema has examples is one of those that occur in the request, as it is listed.
    If none occurs, an argument without other values is left out, or copied if it is required.

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
        self._texts = [_between_separators(text) for text in texts] if only_examples else []
        self._occurs: dict[str, bool] = {}
        self._listed_rules: dict[str, str] = {}
        """Names of rules by their expressions. Arguments with the same examples share a rule."""
        self.rules = [
            f"WORDS: %regex {_substrings(texts)}",
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
        values: dict[str, str] = {}
        for key, schema in properties.items():
            schema = _with_annotations(schema, {"examples": self._examples.get(key, ())})
            value = self._value(schema, definitions, format)
            if value or key in required:
                values[key] = value or "COPIED"
        if not values:
            return '"{}"'
        starts: list[str] = []
        is_first_possible = True
        for index, (key, value) in enumerate(values.items()):
            pair, rest = f"{name}_pair_{index}", f"{name}_rest_{index + 1}"
            # the first pair has no comma before it, so every pair that may be the first is a start of its own
            if is_first_possible:
                starts.append(f"{pair} {rest}")
            is_first_possible = is_first_possible and key not in required
            mark = "" if key in required else "?"
            self.rules.append(f'{pair}: {_quoted(key)} ": " {value}')
            self.rules.append(f'{name}_rest_{index}: (", " {pair}){mark} {rest}')
        self.rules.append(f'{name}_rest_{len(values)}: ""')
        return f'"{{" ({" | ".join(starts)}){"" if required else "?"} "}}"'

    def _value(self, schema: Any, definitions: Mapping[str, Any], format: Any) -> str:
        """Return the expression of one argument, "" if the request or the schema has no value for it."""
        if isinstance(schema, bool):
            return "%json true" if schema else ""
        if _keywords(schema) == {"anyOf"}:
            annotations = {key: schema[key] for key in ("examples", "default") if key in schema}
            schemas = [_with_annotations(each, annotations) for each in schema["anyOf"]]
            return _one_of([self._value(each, definitions, format) for each in schemas])
        if not _is_free_text(schema):
            return _json({**definitions, **schema}, format)
        others = [each for each in _types(schema) if each != "string"]
        return _one_of([self._text(schema), embedded_schema({"type": others}, format) if others else ""])

    def _text(self, schema: Mapping[str, Any]) -> str:
        """Return the expression of a free text, "" if it must be an example and none occurs in the request."""
        examples, listed = _texts_of(schema.get("examples")), _listed(schema)
        if self._only_examples and examples:
            choices = [_quoted_text(each) for each in listed if self._is_in_request(each)]
            if not choices:
                return ""
        elif listed:
            choices = ["RUN", *map(_quoted_text, listed)]
        else:
            return "COPIED"
        expression = f'{self._opening} ({" | ".join(choices)}) "\\""'
        if expression not in self._listed_rules:
            name = self._listed_rules[expression] = f"LISTED_{len(self._listed_rules)}"
            self.rules.append(f"{name}: {expression}")
        return self._listed_rules[expression]

    def _is_in_request(self, example: str) -> bool:
        """Tell whether an example occurs in one of the texts as whole words, in any case."""
        if example not in self._occurs:
            words = _between_separators(example)
            self._occurs[example] = any(words in text for text in self._texts)
        return self._occurs[example]


def _json(schema: Mapping[str, Any], format: Any) -> str:
    """Return the expression of a value of a schema, "" if no value follows it.

    llguidance leaves an argument out of an object if its schema has no value, but refuses such a schema by itself.
    """
    try:
        schema_part(schema, "", format).checked()
    except UsageError:
        return ""
    return embedded_schema(schema, format)


def _keywords(schema: Any) -> set[str]:
    """Return the keywords of a schema that restrict a value."""
    return set(schema) - ANNOTATIONS if isinstance(schema, dict) else set()


def _types(schema: Mapping[str, Any]) -> list[Any]:
    types = schema.get("type")
    return types if isinstance(types, list) else [types]


def _is_free_text(schema: Any) -> bool:
    return _keywords(schema) == {"type"} and "string" in _types(schema)


def _with_annotations(schema: Any, annotations: Mapping[str, Any]) -> Any:
    """Return a schema with further examples, and a default if it has none, if it is a free text or may be one."""
    examples = annotations.get("examples")
    if not (examples or "default" in annotations) or not (_is_free_text(schema) or _keywords(schema) == {"anyOf"}):
        return schema
    return {**annotations, **schema, "examples": [*_texts_of(schema.get("examples")), *_texts_of(examples)]}


def _listed(schema: Mapping[str, Any]) -> list[str]:
    """Return the texts among the examples and the default of a schema."""
    return list(dict.fromkeys([*_texts_of(schema.get("examples")), *_texts_of([schema.get("default")])]))


def _texts_of(values: Any) -> list[str]:
    """Return the texts in a list that are not blank."""
    values = values if isinstance(values, list | tuple) else ()
    return [value for value in values if isinstance(value, str) and value.strip()]


def _one_of(choices: Sequence[str]) -> str:
    """Return the expression of one of the `choices` that are not empty, "" if all are."""
    choices = list(filter(None, choices))
    return f"({' | '.join(choices)})" if len(choices) > 1 else "".join(choices)


def _substrings(texts: Sequence[str]) -> str:
    """Return the arguments of llguidance's %regex for the runs of words of `texts`, as written and in lower case."""
    text = re.sub(r"[^\S\n]+", " ", "\n".join(texts)[-MAX_COPIED_CHARACTERS:])
    words = WORD.findall(text)
    sizes = itertools.accumulate(len(_quoted_text(word)) + len(", ") for word in reversed(words))
    count = sum(size <= MAX_COPIED_CHARACTERS for size in sizes)
    words = words[len(words) - count :]
    lowered = [word.lower() for word in words]
    # The chunk "\n" separates lines, because a RUN has none.
    chunks = words if words == lowered else [*words, "\n", *lowered]
    chunks = [word if word == "\n" else _escaped(word) for word in chunks]
    return json.dumps({"substring_chunks": chunks}, ensure_ascii=False)


def _between_separators(text: str) -> str:
    """Return the words of a text in one form of letters, each between separators that no word contains."""
    # without the dots and their absence that tell the Turkish i, which many write as if it were English
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u0307", "").replace("\u0131", "i")
    words = (word for word in WORD.findall(unicodedata.normalize("NFKC", folded)) if not word.isspace())
    return "\0" + "\0".join(words) + "\0"


def _quoted_text(text: str) -> str:
    """Return the Lark literal of a text within a JSON string."""
    literal = json.dumps(_escaped(text), ensure_ascii=False)
    return literal.replace("\x7f", r"\u007f")  # the only character beyond ASCII's first 32 that Lark refuses


def _escaped(text: str) -> str:
    """Return a text as it is written within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _quoted(text: str) -> str:
    """Return the Lark literal of a JSON string."""
    return json.dumps(json.dumps(text, ensure_ascii=False))
