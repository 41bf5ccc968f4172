"""The texts, chats and questions that ship. They were written for this package and are in the public domain.

There are six kinds of text with ten documents each, 80 questions with a reference answer and 100 questions of fact. No
run trains on them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class ReferenceChat:
    """A question, and the answer of a helpful assistant."""

    question: str
    answer: str


@dataclass(frozen=True)
class Fact:
    """A question with one short answer."""

    question: str
    accept: tuple[re.Pattern[str], ...]
    """Patterns of accepted answers."""

    def is_right(self, answer: str) -> bool:
        """Return True if a pattern matches in the answer's first sentence."""
        sentence = re.split(r"(?<=[.!?])\s|\n", answer.strip(), maxsplit=1)[0]
        return any(pattern.search(sentence) for pattern in self.accept)


def _rows(name: str) -> list[dict[str, Any]]:
    text = resources.files(str(__package__)).joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@cache
def texts() -> dict[str, tuple[str, ...]]:
    """Return {kind of text: its documents}."""
    found: dict[str, tuple[str, ...]] = {}
    for row in _rows("texts.jsonl"):
        found[row["kind"]] = (*found.get(row["kind"], ()), row["text"])
    return found


@cache
def chats() -> tuple[ReferenceChat, ...]:
    """Return the chats of the quality contract."""
    return tuple(ReferenceChat(row["question"], row["answer"]) for row in _rows("chat.jsonl"))


@cache
def facts() -> tuple[Fact, ...]:
    """Return the questions of the quality contract, with the patterns that an answer may have."""
    return tuple(
        Fact(row["question"], tuple(re.compile(pattern, re.IGNORECASE) for pattern in row["accept"]))
        for row in _rows("questions.jsonl")
    )
