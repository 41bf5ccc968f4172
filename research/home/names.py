"""Draw names of rooms, devices and items. Those of the test do not occur in training."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
WORDS: dict[str, Any] = tomllib.loads((FOLDER / "words.toml").read_text(encoding="utf-8"))

UPPER_CASE = frozenset({"tv", "ac", "hvac", "co2", "led"})


def title(text: str) -> str:
    """Write a name as most homes do: "work lamp" becomes "Work Lamp"."""
    words = (word.upper() if word in UPPER_CASE else word[:1].upper() + word[1:] for word in text.split())
    return " ".join(words)


class Names:
    """Source of names. Training has many, mostly made up: a model that sees few learns them by heart."""

    def __init__(self, chance: random.Random, words: Sequence[str], is_test: bool) -> None:
        self.chance, self.words, self.is_test = chance, words, is_test

    def room(self) -> str:
        """Draw the name of an area."""
        if self.is_test:
            return self._written(self._one(WORDS["test"]["rooms"]))
        room = self._one(WORDS["rooms"])
        return self._written(
            self._either((0.45, lambda: room), (0.42, lambda: f"{self._modifier()} {room}"), (0.13, self._made_up))
        )

    def device(self, domain: str, area: str) -> str:
        """Draw the name of a device of `domain` in `area` ("": none)."""
        if self.is_test and domain in WORDS["test"]["names"] and self.chance.random() < 0.7:
            return self._written(self._one(WORDS["test"]["names"][domain]))
        noun = self._one(WORDS["nouns"].get(domain, WORDS["nouns"]["switch"]))
        place = area if self.chance.random() < 0.6 else area.split(" ")[-1]
        in_area = 0.3 if area else 0.0
        return self._written(
            self._either(
                (in_area, lambda: f"{place.lower()} {noun}"),
                (0.1, lambda: noun),
                (0.06, lambda: f"{noun} {self.chance.randint(1, 4)}"),
                (0.06, lambda: f"{self._one(WORDS['foreign'])} {noun}"),
                (0.45, lambda: f"{self._modifier()} {noun}"),
                (0.08, lambda: f"{self._modifier()} {self._modifier()} {noun}"),
                (0.07, self._made_up),
                (0.15 if domain == "vacuum" else 0.0, self.person),
            )
        )

    def person(self) -> str:
        return self._one(WORDS["test"]["people"] if self.is_test else WORDS["people"])

    def item(self) -> str:
        """Draw an entry of a list: a thing to buy or to do."""
        if self.is_test:
            return self._one([*WORDS["test"]["items"], *WORDS["test"]["errands"]])
        thing = self._one(WORDS["item_words"])
        return self._either(
            (0.2, lambda: thing),
            (0.15, lambda: f"{self._one(WORDS['item_adjectives'])} {thing}"),
            (0.2, lambda: f"{self._word()} {thing}"),
            (0.2, self._made_up),
            (0.25, lambda: f"{self._one(WORDS['errands'])} the {self._made_up()}"),
        )

    def query(self) -> str:
        """Draw something to play."""
        return self._one(WORDS["test"]["queries"]) if self.is_test else self._made_up()

    def colour(self) -> str:
        return self._one(WORDS["colours"])

    def refused(self) -> str:
        """Draw a request that no home can answer."""
        text = self._one(WORDS["test"]["refused"] if self.is_test else WORDS["refused"])
        fillers = {"word": self._made_up, "other": self._word, "item": self.item, "person": self.person}
        fillers["number"] = lambda: str(self.chance.randint(2, 99))
        for kind, draw in fillers.items():
            while f"{{{kind}}}" in text:
                text = text.replace(f"{{{kind}}}", draw(), 1)
        return text

    def _one(self, choices: Sequence[str]) -> str:
        return self.chance.choice(choices)

    def _either(self, *choices: tuple[float, Callable[[], str]]) -> str:
        return self.chance.choices([make for _, make in choices], [weight for weight, _ in choices])[0]()

    def _word(self) -> str:
        if self.chance.random() < 0.8:
            return self._one(self.words)
        return "".join(self.chance.choices(WORDS["syllables"], k=self.chance.randint(2, 3)))

    def _made_up(self) -> str:
        return " ".join(self._word() for _ in range(self.chance.choices((1, 2, 3), (5, 4, 1))[0]))

    def _modifier(self) -> str:
        return self._either(
            (0.3, lambda: self._one(WORDS["adjectives"])),
            (0.4, self._word),
            (0.2, lambda: self._one(WORDS["rooms"])),
            (0.1, lambda: f"{self.person()}'s"),
        )

    def _written(self, name: str) -> str:
        """Write a name in the case that a home might use."""
        return self.chance.choices((title(name), name, name[:1].upper() + name[1:]), (88, 6, 6))[0]
