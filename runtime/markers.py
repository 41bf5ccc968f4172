"""Control tokens of a chat are its template's alone: what looks like one in a message is text, wherever it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .engines.owned import OwnedEngine

SPARE = (0xF0000, 0x10FFFD)
"""First and last of the characters that no text is made of (Unicode's private planes)."""


class Disguise:
    """Stand-ins for the control tokens that messages spell, from the rendering of a template to its tokens.

    A stand-in is one character that occurs nowhere else; a template puts it where it would have put the token's text.
    """

    def __init__(self, engine: OwnedEngine, *shown: Any) -> None:
        """`shown`: all that a template is given, texts in any nesting of mappings and sequences."""
        self._engine = engine
        texts = list(_texts(shown))
        taken = set("".join(texts))
        spare = (chr(code) for code in range(SPARE[0], SPARE[1] + 1) if chr(code) not in taken)
        self.end = next(spare)
        """A character to mark a place with."""
        controls = engine.control_texts
        self._controls = re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))))
        found = {text for one in texts for text in self._controls.findall(one)} if controls else set[str]()
        self._stand_ins = {text: next(spare) for text in sorted(found)}
        self._texts = {stand_in: text for text, stand_in in self._stand_ins.items()}

    def hide(self, shown: Any) -> Any:
        """`shown` with a stand-in for every control token's text."""
        if not self._stand_ins:
            return shown
        if isinstance(shown, str):
            return self._controls.sub(lambda found: self._stand_ins[found[0]], shown)
        if isinstance(shown, Mapping):
            return {self.hide(key): self.hide(value) for key, value in shown.items()}
        return [self.hide(one) for one in shown] if isinstance(shown, Sequence) else shown

    def encode(self, rendered: str) -> list[int]:
        """Token ids of what the template made: its own control tokens, and text between them."""
        if not self._texts:
            return self._engine.tokenize(rendered, special=True) if rendered else []
        tokens: list[int] = []
        as_it_is = ""
        for piece in re.split(f"({self._controls.pattern})", rendered):
            if any(character in self._texts for character in piece):
                tokens += self._engine.tokenize(as_it_is, special=True) if as_it_is else []
                text = "".join(self._texts.get(character, character) for character in piece)
                tokens += self._engine.tokenize(text, special=False)
                as_it_is = ""
            else:
                as_it_is += piece
        return tokens + (self._engine.tokenize(as_it_is, special=True) if as_it_is else [])


def _texts(shown: Any) -> Iterator[str]:
    if isinstance(shown, str):
        yield shown
    elif isinstance(shown, Mapping):
        yield from _texts(list(shown))
        yield from _texts(list(shown.values()))
    elif isinstance(shown, Sequence):
        for one in shown:
            yield from _texts(one)
