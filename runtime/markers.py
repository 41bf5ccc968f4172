"""Control tokens of a chat are its template's alone: what looks like one in a message is text, wherever it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from .base.errors import UsageError
from .engines.owned import OwnedEngine

SPARE = "".join(filter(str.isprintable, map(chr, range(0x1FB00, 0x1FBCB))))
"""Characters that hardly a text is made of: Unicode's symbols for legacy computing. They have no case and are no
letters, and Python writes them as they are (private characters it escapes, where a template prints a mapping)."""
TAG = r"</?[A-Za-z]\w{0,30}>"
"""What templates look for in messages, such as </think>."""
NOTHING = "(?!)"


class Disguise:
    """Stand-ins for the first characters of control tokens in messages, from the rendering of a template to its tokens.

    A stand-in is one character that occurs nowhere else; a template puts it where it would have put the other. So every
    control token that it writes is its own, whatever it joins, deletes or repeats of the messages.
    """

    def __init__(self, engine: OwnedEngine, *shown: Any) -> None:
        """`shown`: all that a template is given, texts in any nesting of mappings and sequences.

        UsageError where no character is left to stand in.
        """
        self._engine = engine
        self._controls = _Controls.of(engine.control_texts)
        taken = set("".join(_texts(shown)))
        spare = (character for character in SPARE if character not in taken)
        wanted = ["", *sorted(taken & self._controls.firsts)]
        self._stand_ins = dict(zip(wanted, spare, strict=False))
        if len(self._stand_ins) < len(wanted):
            raise UsageError("the messages use up all of Unicode's symbols for legacy computing; leave some out")
        self.end = self._stand_ins.pop("")
        """A character to mark a place with."""
        self._back = str.maketrans({stand_in: first for first, stand_in in self._stand_ins.items()})

    def hide(self, shown: Any) -> Any:
        """`shown` with stand-ins."""
        if not self._stand_ins:
            return shown
        if isinstance(shown, str):
            return self._controls.beginnings.sub(self._stand_in, shown)
        if isinstance(shown, Mapping):
            return {self.hide(key): self.hide(value) for key, value in shown.items()}
        return [self.hide(one) for one in shown] if isinstance(shown, Sequence) else shown

    def _stand_in(self, found: re.Match[str]) -> str:
        text = found[0]
        is_tag = len(text) > 1 and text not in self._controls.texts
        return text if is_tag or text[0] not in self._stand_ins else self._stand_ins[text[0]] + text[1:]

    def encode(self, rendered: str) -> list[int]:
        """Token ids of what the template made: its own control tokens, and text between them."""
        text = rendered.translate(self._back)
        if self._controls.places(text) == self._controls.places(rendered):  # no message spells one
            return self._tokens(text, special=True)
        tokens: list[int] = []
        as_it_is = ""
        for piece in self._controls.split(rendered):
            if (said := piece.translate(self._back)) == piece:
                as_it_is += piece
            else:
                tokens += self._tokens(as_it_is, special=True) + self._tokens(said, special=False)
                as_it_is = ""
        return tokens + self._tokens(as_it_is, special=True)

    def _tokens(self, text: str, special: bool) -> list[int]:
        return self._engine.tokenize(text, special) if text else []


class _Controls:
    """A vocabulary's control tokens in texts."""

    def __init__(self, texts: frozenset[str]) -> None:
        self.texts = texts
        self.firsts = {text[0] for text in texts}
        firsts = f"[{''.join(map(re.escape, sorted(self.firsts)))}]" if texts else NOTHING
        self.beginnings = re.compile(f"{TAG}|{firsts}")
        """Where one may begin: a tag, or a first character."""
        self._all = re.compile(f"({_any_of(sorted(texts)) if texts else NOTHING})")

    @staticmethod
    @lru_cache(maxsize=8)
    def of(texts: frozenset[str]) -> _Controls:
        """Made once for an engine: there may be thousands."""
        return _Controls(texts)

    def places(self, text: str) -> list[int]:
        """Where they stand in a text."""
        return [found.start() for found in self._all.finditer(text)]

    def split(self, text: str) -> list[str]:
        """Control tokens and what stands between them."""
        return self._all.split(text)


def _any_of(texts: Sequence[str], start: int = 0) -> str:
    """A pattern of sorted texts, the longest first, without groups: their common beginnings are read once, so that a
    text is searched in the time of its length."""
    branches: dict[str, list[str]] = {}
    for text in texts:
        if len(text) > start:
            branches.setdefault(text[start], []).append(text)
    is_end = len(texts[0]) == start
    if not branches:
        return ""
    each = [re.escape(first) + _any_of(begun, start + 1) for first, begun in branches.items()]
    joined = each[0] if len(each) == 1 and not is_end else f"(?:{'|'.join(each)})"
    return joined + "?" if is_end else joined


def _texts(shown: Any) -> Iterator[str]:
    if isinstance(shown, str):
        yield shown
    elif isinstance(shown, Mapping):
        yield from _texts(list(shown))
        yield from _texts(list(shown.values()))
    elif isinstance(shown, Sequence):
        for one in shown:
            yield from _texts(one)
