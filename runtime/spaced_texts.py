"""Texts in arguments that begin with a space, which is no part of them.

Most tokenizers have other tokens for a word at the start of a JSON string than for the same word in a sentence:
" lava" is one token, and "lava" is "l" and "ava". With the space, a model that copies a word of the request writes the
tokens that it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPPINGS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = ("items", "additionalProperties")
"""Keywords of a JSON schema with further schemas: in a list, in an object, or one."""
_LENGTHS = {"minLength", "maxLength"}


def with_spaces(value: Any) -> Any:
    """Return a JSON value with a space before each of its texts. Keys stay as they are."""
    if isinstance(value, str):
        return f" {value}"
    if isinstance(value, Mapping):
        return {key: with_spaces(each) for key, each in value.items()}
    return [with_spaces(each) for each in value] if isinstance(value, list | tuple) else value


def schema_with_spaces(schema: Any) -> Any:
    """Return the JSON schema of values that `with_spaces` changes.

    Enumerations, constants and texts of a limited length get the space. A text with a pattern or a format has none, and
    any other text may have it.
    """
    if not isinstance(schema, Mapping):
        return schema
    spaced = dict(schema)
    lengths = _LENGTHS & schema.keys()
    if lengths and not {"pattern", "format"} & schema.keys():
        # the space counts as a character, so it must be there whenever the limits are raised by one
        spaced |= {"pattern": "^ ", **{key: schema[key] + 1 for key in lengths}}
    for key in {"enum", "const"} & schema.keys():
        spaced[key] = with_spaces(schema[key])
    for key in _SCHEMAS & schema.keys():
        spaced[key] = schema_with_spaces(schema[key])
    for key in _LISTS & schema.keys():
        spaced[key] = [schema_with_spaces(each) for each in schema[key]]
    for key in _MAPPINGS & schema.keys():
        spaced[key] = {name: schema_with_spaces(each) for name, each in schema[key].items()}
    return spaced


class ObjectScanner:
    """Reads JSON objects piece by piece: finds the end of one, and removes the space at the start of each text.

    Text outside an object stays as it is, and so does a key.
    """

    def __init__(self) -> None:
        self.is_over = False
        """True after the end of the object that `push_object` reads."""
        self._open: list[str] = []
        """Opening brackets of the objects and lists around the next character."""
        self._is_key = False
        """True if the next string is a key."""
        self._in_string = self._is_escaped = self._is_first = False

    def push(self, text: str) -> str:
        """Return a piece without these spaces."""
        return "".join(character for character in text if self._is_shown(character))

    def push_object(self, text: str) -> tuple[int, str]:
        """Return the number of characters of `text` that belong to the first object, and these without the spaces."""
        shown: list[str] = []
        for length, character in enumerate(text, 1):
            was_open = bool(self._open)
            if self._is_shown(character):
                shown.append(character)
            if was_open and not self._open:
                self.is_over = True
                return length, "".join(shown)
        return len(text), "".join(shown)

    def _is_shown(self, character: str) -> bool:
        is_first, self._is_first = self._is_first, False
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
            return not (is_first and character == " ")
        if character in "{[" and (self._open or character == "{"):
            self._open.append(character)
            self._is_key = character == "{"
        elif self._open and character in "}]":
            self._open.pop()
        elif self._open and character == '"':
            self._in_string, self._is_first = True, not self._is_key
        elif self._open and character in ",:":
            self._is_key = character == "," and self._open[-1] == "{"
        return True
