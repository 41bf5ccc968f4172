"""The texts, chats and questions that ship: written for this package, in the public domain, trained on by no run.

Six kinds of text with ten documents each, eighty questions with a reference answer, a hundred questions of fact."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Chat:
    """A question and an answer as a helpful assistant would give it."""

    question: str
    answer: str


@dataclass(frozen=True)
class Fact:
    """A question with one short answer."""

    question: str
    accept: tuple[re.Pattern[str], ...]
    """One of these is found in a right answer."""

    def is_right(self, answer: str) -> bool:
        """Whether the first sentence that says anything holds an accepted answer."""
        sentence = re.split(r"(?<=[.!?])\s|\n", answer.strip(), maxsplit=1)[0]
        return any(pattern.search(sentence) for pattern in self.accept)


def _rows(name: str) -> list[dict[str, Any]]:
    text = resources.files(str(__package__)).joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@cache
def texts() -> dict[str, tuple[str, ...]]:
    """{kind: documents}"""
    found: dict[str, tuple[str, ...]] = {}
    for row in _rows("texts.jsonl"):
        found[row["kind"]] = (*found.get(row["kind"], ()), row["text"])
    return found


@cache
def chats() -> tuple[Chat, ...]:
    return tuple(Chat(row["question"], row["answer"]) for row in _rows("chat.jsonl"))


@cache
def facts() -> tuple[Fact, ...]:
    return tuple(
        Fact(row["question"], tuple(re.compile(pattern, re.IGNORECASE) for pattern in row["accept"]))
        for row in _rows("questions.jsonl")
    )
