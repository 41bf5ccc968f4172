"""Read the records that a conversation lists, as a chat template describes them.

The template says in a comment how its context lists records. Each line has the text around the values of fields:

    {#- efficientllm lists
    - names: {name}
      domain: {domain}
    -#}

A record begins with a line of the first form. The other lines may follow in any order, or be absent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from .base.errors import UsageError

Record = Mapping[str, tuple[str, ...]]
"""Field -> its values. A list in one line, separated by commas, is also one value."""

_COMMENT = re.compile(r"\{#-? *efficientllm lists *\n(.*?)\n\s*-?#\}", re.DOTALL)


def listed_records(template: str | None, texts: Iterable[str]) -> tuple[Record, ...] | None:
    """Return the records in `texts`, None if the template does not say how they are listed.

    Raises UsageError if its comment has a line that cannot be read, as with a field that occurs twice.
    """
    found = _COMMENT.search(template or "")
    if found is None or not found[1].strip():
        return None
    return tuple(record for text in texts for record in _records(found[1], text))


@lru_cache(maxsize=16)
def _forms(pattern: str) -> tuple[re.Pattern[str], ...]:
    """Return a regular expression for each line of a pattern, which takes time linear in the text."""
    forms = []
    for line in pattern.splitlines():
        begin, *parts = re.split(r"\{(\w+)\}", line)
        pairs = list(zip(parts[::2], parts[1::2], strict=True))
        # an atomic group ends at the first text that follows the field
        inner = "".join(f"(?>(?P<{name}>.+?){re.escape(after)})" for name, after in pairs[:-1])
        last = "".join(f"(?P<{name}>.+){re.escape(after)}" for name, after in pairs[-1:])
        try:
            forms.append(re.compile(re.escape(begin) + inner + last))
        except re.error as error:
            raise UsageError(f"the chat template lists records by {line!r}: {error}; correct its comment") from error
    return tuple(forms)


@lru_cache(maxsize=32)
def _records(pattern: str, text: str) -> tuple[Record, ...]:
    first, *others = _forms(pattern)
    records: list[dict[str, tuple[str, ...]]] = []
    is_open = False
    for line in re.split("\r?\n", text):  # splitlines would also split within names
        found = first.fullmatch(line)
        if found:
            records.append({})
            is_open = True
        elif is_open:
            found = next(filter(None, (form.fullmatch(line) for form in others)), None)
            is_open = found is not None or line.startswith((" ", "\t"))
        if found:
            records[-1].update((name, _values(value)) for name, value in found.groupdict().items())
    return tuple(records)


def _values(text: str) -> tuple[str, ...]:
    """Return the values in a text, without the quotes of YAML."""
    parts = [text, *text.split(", ")] if ", " in text else [text]
    return tuple(dict.fromkeys(filter(None, map(_unquoted, parts))))


def _unquoted(text: str) -> str:
    text = text.strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1].replace(text[0] * 2, text[0]) if is_quoted else text
