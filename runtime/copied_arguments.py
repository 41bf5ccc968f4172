"""Write the grammar of a call's arguments whose free texts are words of the request, or listed in the conversation."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from .base.errors import UsageError
from .grammar import LENIENT_CALL_JSON, embedded_schema, schema_part
from .listed_context import Record

ToolArguments = Literal["any", "copy", "examples", "listed"]
"""Free texts in arguments of calls: any; words of the request; those examples of their schemas that occur in it; or
values of the records that the conversation lists, of one record in each call."""

MAX_COPIED_CHARACTERS = 1 << 15
"""Largest length of the words to copy from, as the grammar writes them. The last ones of a longer request are used.

Both forms, as written and in lower case, take half of a grammar's MAX_CHARACTERS.
"""

MARKS = r"\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0900-\u0963\u0966-\u0dff"
"""Accents and vowel signs, and the letters of the scripts of India among them. No \\w matches a sign by itself."""

WORD = re.compile(rf"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[\w{MARKS}]+|\W")
"""A word, a sign, or a character of a script without spaces between words (Thai, Lao, Japanese, Chinese)."""

ANNOTATIONS = {"$comment", "title", "description", "examples", "default", "deprecated"}
"""Keywords of a JSON schema that restrict nothing."""

DEFINITIONS = ("$defs", "definitions")

NUMBERS = {
    "integer": "/-?(0|[1-9][0-9]{0,15})/",
    "number": r"/-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?([eE][-+]?[0-9]{1,3})?/",
}
"""Expressions of numbers. Small models write digits without end where JSON allows it."""

OBJECT_KEYWORDS = ANNOTATIONS | {"type", "properties", "required", "additionalProperties"}
OBJECT_KEYWORDS |= {"$schema", "$id", *DEFINITIONS}
"""Keywords of parameters whose arguments may be copied."""

QUOTE = json.dumps('"')
"""Lark literal of the start of a JSON string."""

TEXT_KEYWORDS = {"type", "enum", "minLength", "maxLength", "pattern", "format"}
"""Keywords of a text that may be listed."""


@dataclass(frozen=True)
class _Slot:
    """An argument between the first and the last listed one of a function."""

    key: str
    """The argument's name in JSON, as a Lark literal."""
    value: str
    """Expression of its values that are not listed, "" if there are none."""
    is_required: bool
    """True if every call has it."""
    is_text: bool = False
    """True if it may be a listed value."""
    is_array: bool = False
    """True if it may be a list of listed values."""


@dataclass(frozen=True)
class _Kind:
    """The values of an argument that records may list."""

    texts: Sequence[Mapping[str, Any]]
    """Schemas of which a text follows one."""
    items: Sequence[Mapping[str, Any]]
    """Schemas of which each text of a list follows one."""
    others: str
    """Expression of its values of other types, "" if there are none."""

    @property
    def is_free(self) -> bool:
        """Return True if it may be any text."""
        return bool(self.texts) and all(map(_is_free_text, [*self.texts, *self.items]))

    @property
    def is_limited(self) -> bool:
        """Return True if all of its values are from an `enum`.

        Such an argument tells on which records its function acts.
        """
        return not self.others and all("enum" in each for each in [*self.texts, *self.items])

    def written(self, value: str, is_spaced: bool) -> str:
        """Return a listed value as an argument has it, "" if its schema does not allow it.

        If texts are spaced, it begins with a space unless its schema forbids that (see `schema_with_spaces`).
        """
        spaced = " " * is_spaced + value
        places = [each for each in (self.texts, self.items) if each and not any(map(_is_free_text, each))]
        forms = (value, spaced) if places else (spaced,)
        return next((text for text in forms if all(_follows_one(text, each) for each in places)), "")


State = frozenset[tuple[tuple[str, ...], ...]]
"""Values of the listed arguments that follow, for each record that agrees with those before."""


@dataclass(frozen=True)
class _Listed:
    """The listed arguments of a function."""

    state: State
    """Their values in the records on which the function may act."""
    kinds: Mapping[str, _Kind]
    """Those with a value in such a record."""
    absent: Mapping[str, _Kind]
    """Free texts without one."""


class CopiedArguments:
    """Lark rules for arguments. A free text is a run of words of the request, or an example or default of its schema.

    With `only_examples`, a text whose schema has examples is one of those that occur in the request, as it is listed.
    If none occurs, an argument without other values is left out, or copied if it is required.

    With `records`, an argument with the name of one of their fields is a value of that field. All such arguments of a
    call agree with one record. A function whose schema lists some values acts on records with one of them.

    A text is free if its schema has no keywords but its type and annotations. All other values follow their schema.
    """

    def __init__(
        self,
        texts: Sequence[str],
        *,
        are_spaced: bool = False,
        only_examples: bool = False,
        records: Sequence[Record] = (),
    ) -> None:
        """Look for examples in `texts`. The words to copy from are those of `words_rule`.

        With `are_spaced`, a free text begins with a space (see spaced_texts).
        """
        self._only_examples, self._are_spaced = only_examples, are_spaced
        self._records, self._fields = records, {field for record in records for field in record}
        self._chains: dict[tuple[tuple[_Slot, ...], State, bool], str] = {}
        """Names of the rules of `_chain`."""
        self._opening = json.dumps('" ' if are_spaced else '"')
        self._texts = [_between_separators(text) for text in texts] if only_examples else []
        self._occurs: dict[str, bool] = {}
        self._listed_rules: dict[str, str] = {}
        """Names of rules by their expressions. Arguments with the same examples share a rule."""
        self.rules = [r"RUN: WORDS & /([^ \n](.*[^ \n])?)?/", rf'COPIED: {self._opening} RUN "\""']
        """The rules so far, to which `add` appends those of a function."""

    def add(self, name: str, parameters: Mapping[str, Any], format: Any) -> str:
        """Return the expression of the arguments of one function, whose new rules begin with `name`.

        llguidance must have accepted `parameters`, a JSON schema. JSON has its `format`.
        """
        properties, required = parameters.get("properties"), parameters.get("required", [])
        if not set(parameters) <= OBJECT_KEYWORDS or not properties or not set(required) <= set(properties):
            return embedded_schema(parameters, format)
        definitions = {key: parameters[key] for key in DEFINITIONS if key in parameters}
        listed = self._listed_arguments(properties, definitions, format)
        slots: list[_Slot] = []
        for key, schema in properties.items():
            is_required, kind = key in required, listed.kinds.get(key)
            copied = "COPIED" if is_required else ""
            if kind is not None:
                slots.append(_Slot(_quoted(key), kind.others, is_required, bool(kind.texts), bool(kind.items)))
                continue
            if key in listed.absent:
                value = _one_of([copied, listed.absent[key].others])
            else:
                value = self._value(schema, definitions, format) or copied
            if value:
                slots.append(_Slot(_quoted(key), value, is_required))
        pairs = self._pairs(slots, listed.state)
        if not pairs:
            return '"{}"'
        starts: list[str] = []
        is_first_possible = True
        for index, (expression, is_required) in enumerate(pairs):
            pair, rest = f"{name}_pair_{index}", f"{name}_rest_{index + 1}"
            # the first pair has no comma before it, so every pair that may be the first is a start of its own
            if is_first_possible:
                starts.append(f"{pair} {rest}")
            is_first_possible = is_first_possible and not is_required
            mark = "" if is_required else "?"
            self.rules.append(f"{pair}: {expression}")
            self.rules.append(f'{name}_rest_{index}: (", " {pair}){mark} {rest}')
        self.rules.append(f'{name}_rest_{len(pairs)}: ""')
        return f'"{{" ({" | ".join(starts)}){"" if required else "?"} "}}"'

    def _listed_arguments(self, properties: Mapping[str, Any], definitions: Mapping[str, Any], format: Any) -> _Listed:
        """Return the listed arguments of a function, whose `properties` may refer to `definitions`.

        Arguments whose values are all from an `enum` leave only the records with one of them.
        """
        found = {key: self._kind(properties[key], definitions, format) for key in properties if key in self._fields}
        kinds = {key: kind for key, kind in found.items() if kind is not None}
        enums = [key for key, kind in kinds.items() if kind.is_limited]
        values: list[dict[str, list[str]]] = []
        for record in self._records:
            allowed = {
                key: [*filter(None, (kind.written(each, self._are_spaced) for each in record.get(key, ())))]
                for key, kind in kinds.items()
            }
            if all(allowed[key] for key in enums):
                values.append(allowed)
        present = {key: kind for key, kind in kinds.items() if any(each[key] for each in values)}
        state = frozenset(tuple(tuple(each[key]) for key in present) for each in values)
        absent = {key: kind for key, kind in kinds.items() if kind.is_free and key not in present}
        return _Listed(state, present, absent)

    def _kind(self, schema: Any, definitions: Mapping[str, Any], format: Any) -> _Kind | None:
        """Return the kind of an argument, None if it is neither a text nor a list of texts."""
        texts, lists, others = [], [], []
        for each in _choices(schema, definitions):
            is_list = _keywords(each) == {"type", "items"} and each["type"] == "array"
            items = _choices(each["items"], definitions) if is_list else []
            if _may_be_listed(each):
                texts.append(each)
            elif items and all(map(_may_be_listed, items)):
                lists += items
            else:
                others.append(self._choice(each, definitions, format))
        return _Kind(texts, lists, _one_of(others)) if texts or lists else None

    def _pairs(self, slots: Sequence[_Slot], state: State) -> list[tuple[str, bool]]:
        """Return (expression, whether it is required) of each argument. Those around listed ones are one expression."""
        single = [(f'{slot.key} ": " {slot.value}', slot.is_required) for slot in slots]
        positions = [index for index, slot in enumerate(slots) if slot.is_text or slot.is_array]
        if not positions:
            return single
        first, after = positions[0], positions[-1] + 1
        chain = self._chain(tuple(slots[first:after]), state, is_first=True)
        is_required = any(slot.is_required for slot in slots[first:after])
        return [*single[:first], *([(chain, is_required)] if chain else []), *single[after:]]

    def _chain(self, slots: tuple[_Slot, ...], state: State, *, is_first: bool) -> str:
        """Return the rule of the arguments of `slots`, "" if there is none. It may write none unless it `is_first`."""
        if not slots:
            return "" if is_first else '""'
        if (slots, state, is_first) in self._chains:
            return self._chains[slots, state, is_first]
        slot, rest = slots[0], slots[1:]
        values, skipped = [(slot.value, state)], state
        if slot.is_text or slot.is_array:
            skipped = frozenset(each[1:] for each in state)
            values = [*self._listed_values(slot, state), *([(slot.value, skipped)] if slot.value else [])]
        followed = [(value, self._chain(rest, after, is_first=False)) for value, after in values]
        choices = [f"{value} {chain}" for value, chain in followed if chain]
        comma = "" if is_first else '", " '
        alternatives = [f'{comma}{slot.key} ": " ({" | ".join(choices)})'] if choices else []
        if not slot.is_required and (without := self._chain(rest, skipped, is_first=is_first)):
            alternatives.append(without)
        name = f"linked_{len(self._chains)}" if alternatives else ""
        if name:
            self.rules.append(f"{name}: {' | '.join(alternatives)}")
        self._chains[slots, state, is_first] = name
        return name

    def _listed_values(self, slot: _Slot, state: State) -> list[tuple[str, State]]:
        """Return (expression, state after it) of each set of values that leave the same records."""
        tails: dict[str, set[tuple[tuple[str, ...], ...]]] = {}
        for head, *tail in state:
            for value in head:
                tails.setdefault(value, set()).add(tuple(tail))
        groups: dict[State, list[str]] = {}
        for value in sorted(tails):
            groups.setdefault(frozenset(tails[value]), []).append(value)
        found = [(self._rule_of(map(_quoted_text, values), QUOTE), after) for after, values in groups.items()]
        texts = found if slot.is_text else []
        if not slot.is_array:
            return texts
        one = [(f'"[" {rule} "]"', after) for rule, after in found]
        every = self._rule_of(map(_quoted_text, sorted(tails)), QUOTE)
        rest = frozenset(tail for tails_of_value in tails.values() for tail in tails_of_value)
        return [*texts, *one, *([(f'"[" {every} (", " {every})+ "]"', rest)] if len(tails) > 1 else [])]

    def _value(self, schema: Any, definitions: Mapping[str, Any], format: Any) -> str:
        """Return the expression of one argument, "" if the request or the schema has no value for it."""
        return _one_of([self._choice(each, definitions, format) for each in _choices(schema, definitions)])

    def _choice(self, schema: Any, definitions: Mapping[str, Any], format: Any) -> str:
        """Return the expression of one of the `_choices` of an argument, "" if there is no value for it."""
        if isinstance(schema, bool):
            return "%json true" if schema else ""
        if _is_free_text(schema):
            return self._text(schema)
        is_number = _keywords(schema) == {"type"} and schema["type"] in NUMBERS
        return NUMBERS[schema["type"]] if is_number else _json({**definitions, **schema}, format)

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
        return self._rule_of(choices, self._opening)

    def _rule_of(self, choices: Iterable[str], opening: str) -> str:
        """Return the rule of a text that is one of `choices` after the `opening`."""
        expression = f'{opening} ({" | ".join(choices)}) "\\""'
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


def _choices(schema: Any, definitions: Mapping[str, Any]) -> list[Any]:
    """Return the schemas that a value follows one of, each with one type. A reference is followed once."""
    if isinstance(schema, dict) and isinstance(schema.get("type"), list):
        return [{**schema, "type": each} for each in schema["type"]]
    choices: list[Any] = []
    if _keywords(schema) == {"anyOf"}:
        choices = [choice for each in schema["anyOf"] for choice in _choices(each, definitions)]
    elif _keywords(schema) == {"$ref"}:
        group, _, name = schema["$ref"].removeprefix("#/").partition("/")
        others = {key: dict(each) for key, each in definitions.items()}
        choices = _choices(others[group].pop(name), others) if name in others.get(group, ()) else []
    return [_with_examples(each, schema) for each in choices] or [schema]


def _may_be_listed(schema: Any) -> bool:
    """Tell whether all values of a schema are texts, or it limits texts and names no type."""
    if not set() < _keywords(schema) <= TEXT_KEYWORDS:
        return False
    are_texts = "type" not in schema and all(isinstance(each, str) for each in schema.get("enum", ()))
    return are_texts or schema.get("type") == "string"


@lru_cache(maxsize=4096)
def _follows(text: str, schema: str) -> bool:
    """Tell whether a text follows a JSON schema."""
    part = schema_part(json.loads(schema), "", LENIENT_CALL_JSON)
    return part.allowed_start(json.dumps(text, ensure_ascii=False)) is None


def _follows_one(text: str, schemas: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a text follows one of the JSON schemas.

    Their annotations do not count, so the same limit of many arguments is checked once.
    """
    limits = ({key: each[key] for key in _keywords(each)} for each in schemas)
    return any(_follows(text, json.dumps(each)) for each in limits)


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


def _is_free_text(schema: Any) -> bool:
    return _keywords(schema) == {"type"} and schema["type"] == "string"


def _with_examples(schema: Any, outer: Mapping[str, Any]) -> Any:
    """Return a schema with the examples and the default of an `outer` one, if it is a free text."""
    if not _is_free_text(schema):
        return schema
    examples = [*_texts_of(schema.get("examples")), *_texts_of(outer.get("examples"))]
    return {"default": outer.get("default"), **schema, "examples": examples}


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


def words_rule(texts: Sequence[str]) -> str:
    """Return the rule of the runs of words of `texts`, as written and in lower case, with llguidance's %regex."""
    text = re.sub(r"[^\S\n]+", " ", "\n".join(texts)[-MAX_COPIED_CHARACTERS:])
    words = WORD.findall(text)
    sizes = itertools.accumulate(len(_quoted_text(word)) + len(", ") for word in reversed(words))
    count = sum(size <= MAX_COPIED_CHARACTERS for size in sizes)
    words = words[len(words) - count :]
    lowered = [word.lower() for word in words]
    # The chunk "\n" separates lines, because a RUN has none.
    chunks = words if words == lowered else [*words, "\n", *lowered]
    chunks = [word if word == "\n" else _escaped(word) for word in chunks]
    return f"WORDS: %regex {json.dumps({'substring_chunks': chunks}, ensure_ascii=False)}\n"


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
